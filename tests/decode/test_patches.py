"""The private hooks of transformers; a release that moves one must fail here, not silently."""

from __future__ import annotations

import inspect

from transformers import GenerationMixin, LlamaForCausalLM
from transformers.generation.candidate_generator import CandidateGenerator
from transformers.generation.utils import GENERATION_MODES_MAPPING

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
