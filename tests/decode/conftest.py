from __future__ import annotations

from collections.abc import Callable

import pytest
from tiny_models import noisy
from transformers import LlamaForCausalLM

TinyModel = Callable[..., LlamaForCausalLM]


@pytest.fixture(scope="module")
def target(tiny_model: TinyModel) -> LlamaForCausalLM:
    return tiny_model(seed=0)


@pytest.fixture(scope="module")
def stranger(tiny_model: TinyModel) -> LlamaForCausalLM:
    """A draft that knows nothing of the target."""
    return tiny_model(seed=1, num_hidden_layers=1)


@pytest.fixture(scope="module")
def neighbour(tiny_model: TinyModel) -> LlamaForCausalLM:
    """A draft that is right now and then: the target with a little noise on its weights."""
    return noisy(tiny_model(seed=0))
