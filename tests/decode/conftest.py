from collections.abc import Callable

import pytest
import torch
from decoding_helpers import VOCABULARY
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


@pytest.fixture(scope="module")
def pair(tiny_model: TinyModel) -> tuple[LlamaForCausalLM, LlamaForCausalLM]:
    """A target of six tokens that is sure of none, and a draft that half agrees."""

    def make() -> LlamaForCausalLM:
        model = tiny_model(
            seed=3, vocab_size=VOCABULARY, num_hidden_layers=1, eos_token_id=None, pad_token_id=0
        )
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(0.6)
        return model

    return make(), noisy(make(), 0.7)
