from collections.abc import Callable
from pathlib import Path

from transformers import AutoModelForCausalLM, GenerationConfig, LlamaForCausalLM

from fastdraft_hf.decode.settings import LOOKUP, read_draft_tokens, store_draft_settings
from fastdraft_hf.decode.speculative import drafting_of


def test_stored_settings_come_with_the_draft(
    tmp_path: Path, tiny_model: Callable[..., LlamaForCausalLM]
) -> None:
    draft = tiny_model(seed=1)
    draft.generation_config.max_new_tokens = 77
    draft.save_pretrained(tmp_path)
    assert read_draft_tokens(tmp_path) is None
    store_draft_settings(tmp_path, temperature_ratio=0.75)
    store_draft_settings(tmp_path, 4)
    assert read_draft_tokens(tmp_path) == 4
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    drafting = drafting_of(loaded)
    assert (drafting.num_assistant_tokens, drafting.schedule) == (4, "constant")
    assert (drafting.threshold, drafting.max_positions) == (0.0, 512)
    assert drafting.temperature_ratio == 0.75
    assert drafting.prompt_lookup_min == LOOKUP
    assert loaded.generation_config.max_new_tokens == 77


def test_a_folder_without_a_config_gets_one(tmp_path: Path) -> None:
    assert read_draft_tokens(tmp_path) is None
    store_draft_settings(tmp_path, 2)
    assert GenerationConfig.from_pretrained(tmp_path).num_assistant_tokens == 2


def test_a_draft_that_says_nothing_has_transformers_defaults(
    tiny_model: Callable[..., LlamaForCausalLM],
) -> None:
    drafting = drafting_of(tiny_model(seed=1))
    stock = GenerationConfig()._get_default_generation_params()
    assert drafting.num_assistant_tokens == stock["num_assistant_tokens"]
    assert drafting.schedule == stock["num_assistant_tokens_schedule"]
    assert drafting.threshold == stock["assistant_confidence_threshold"]
    assert drafting.temperature_ratio == 1
    assert drafting.prompt_lookup_min == 0
