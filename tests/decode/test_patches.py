"""The private hooks of transformers; a release that moves one must fail here, not silently."""

from __future__ import annotations

import inspect

import pytest
import torch
from decoding_helpers import write
from transformers import GenerationMixin, LlamaForCausalLM
from transformers.generation.candidate_generator import CandidateGenerator
from transformers.generation.utils import GENERATION_MODES_MAPPING

from fastdraft_hf.decode.assisted import record_rounds
from fastdraft_hf.decode.patches import CACHE_NAME


def test_the_hooks_are_still_there() -> None:
    assert callable(GenerationMixin._assisted_decoding)
    assert callable(GenerationMixin._get_candidate_generator)
    assert callable(CandidateGenerator.update_candidate_strategy)
    assert (
        "custom_generate"
        in inspect.signature(GenerationMixin._extract_generation_mode_kwargs).parameters
    )
    for method in GENERATION_MODES_MAPPING.values():
        assert "/" in method or callable(getattr(GenerationMixin, method))


def test_models_take_the_cache_by_its_name(target: LlamaForCausalLM) -> None:
    assert CACHE_NAME in inspect.signature(target.forward).parameters


@pytest.mark.parametrize("ours", [True, False])
def test_rounds_are_reported(
    target: LlamaForCausalLM, neighbour: LlamaForCausalLM, ours: bool
) -> None:
    write(target, [[40, 41]], neighbour, 3)  # sets the draft's length
    with record_rounds(target) as rounds:
        if ours:
            write(target, [[40, 41]], neighbour, 3)
        else:
            ids = torch.tensor([[40, 41]])
            target.generate(ids, do_sample=False, max_new_tokens=12, assistant_model=neighbour)
    assert rounds
