from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, PretrainedConfig

from fastdraft_hf._errors import FastDraftError
from fastdraft_hf.drafts.config import DesignConfig, FirstWeights
from fastdraft_hf.drafts.design import (
    FUSED_FAMILIES,
    SUPPORTED_FAMILIES,
    count_parameters,
    design_draft,
    kept_layers,
)

VOCABULARY = 96


def tiny_target(family: str, **changes: Any) -> PretrainedConfig:
    fields: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 5,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": 256,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    if family == "qwen3":
        fields["head_dim"] = 16  # Qwen3's heads are not hidden_size / heads
    return AutoConfig.for_model(family, **{**fields, **changes})


def real_size(config: PretrainedConfig) -> int:
    model = AutoModelForCausalLM.from_config(config)
    return sum(p.numel() for p in {id(p): p for p in model.parameters()}.values())


def sharpened(config: PretrainedConfig, seed: int) -> Any:
    """A random model whose greedy choices are far from ties."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6)
    return model


@pytest.mark.parametrize("first_weights", get_args(FirstWeights))
@pytest.mark.parametrize("family", SUPPORTED_FAMILIES)
@settings(max_examples=3)
@given(
    heads=st.sampled_from([(8, 8), (8, 4), (8, 2), (4, 4), (4, 1)]),
    tied=st.booleans(),
    layers=st.integers(1, 5),
    budget=st.integers(10_000, 90_000),
    multiple=st.sampled_from([8, 16, 32]),
)
def test_every_family_gives_a_draft_that_works(
    tmp_path_factory: pytest.TempPathFactory,
    family: str,
    first_weights: FirstWeights,
    heads: tuple[int, int],
    tied: bool,
    layers: int,
    budget: int,
    multiple: int,
) -> None:
    target_config = tiny_target(
        family,
        num_attention_heads=heads[0],
        num_key_value_heads=heads[1],
        tie_word_embeddings=tied,
    )
    before = target_config.to_dict()
    wanted = DesignConfig(
        params=budget,
        num_hidden_layers=layers,
        width_multiple=multiple,
        first_weights=first_weights,
    )
    try:
        config = design_draft(target_config, wanted)
    except FastDraftError as error:
        fused = family in FUSED_FAMILIES and first_weights == "slice"
        reason = "cannot be sliced" if fused else "cannot hold a vocabulary"
        assert reason in str(error)  # noqa: PT017
        return
    finally:
        assert target_config.to_dict() == before
    assert config.model_type == family
    assert (config.num_hidden_layers, config.vocab_size) == (layers, VOCABULARY)
    assert config.tie_word_embeddings is tied
    assert config.hidden_size % multiple == 0
    assert count_parameters(config) == real_size(config) <= budget

    draft = sharpened(config, seed=1)
    folder = tmp_path_factory.mktemp("draft")
    draft.save_pretrained(folder)
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.tensor([[5, 17, 40, 8, 77, 3]])
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, draft(ids).logits)

    target = sharpened(target_config, seed=2)
    alone = target.generate(ids, max_new_tokens=12, do_sample=False)
    helped = target.generate(ids, max_new_tokens=12, do_sample=False, assistant_model=loaded)
    assert helped.tolist() == alone.tolist()


@given(budget=st.integers(20_000, 120_000), layers=st.integers(1, 4))
@settings(max_examples=20)
def test_the_widest_that_fits(budget: int, layers: int) -> None:
    target = tiny_target("llama", hidden_size=96, num_attention_heads=12)

    def at(width: int) -> PretrainedConfig | None:
        try:
            return design_draft(target, DesignConfig(hidden_size=width, num_hidden_layers=layers))
        except FastDraftError:
            return None  # the width does not divide into its heads

    sizes = {w: count_parameters(c) for w in range(8, 97, 8) if (c := at(w)) is not None}
    fitting = [width for width, size in sizes.items() if size <= budget]
    wanted = DesignConfig(params=budget, num_hidden_layers=layers, width_multiple=8)
    if not fitting:
        with pytest.raises(FastDraftError, match=f"is {min(sizes.values()):,}$"):
            design_draft(target, wanted)
        return
    assert design_draft(target, wanted).hidden_size == max(fitting)


@pytest.mark.parametrize("tied", [True, False])
def test_the_count_is_exact_on_the_real_target(target_folder: Path, tied: bool) -> None:
    target = AutoConfig.from_pretrained(target_folder)
    target.tie_word_embeddings = tied
    config = design_draft(target, DesignConfig(params=20_000_000))
    size = count_parameters(config)
    assert size == real_size(config) <= 20_000_000
    wider = design_draft(
        target, DesignConfig(hidden_size=next_width(target, config.hidden_size, step=32))
    )
    assert count_parameters(wider) > 20_000_000
    assert config.vocab_size == 49152
    assert config.head_dim == target.hidden_size // target.num_attention_heads
    assert config.rope_parameters == target.rope_parameters


def next_width(target: PretrainedConfig, width: int, step: int) -> int:
    for wider in itertools.count(width + step, step):
        try:
            design_draft(target, DesignConfig(hidden_size=wider))
        except FastDraftError as error:
            assert "no multiple of the" in str(error)  # noqa: PT017
        else:
            return wider
    raise AssertionError


def test_a_family_without_a_design() -> None:
    with pytest.raises(FastDraftError, match=r"family 'gpt2' has no draft design yet.*llama"):
        design_draft(GPT2Config(), DesignConfig())


def test_a_budget_below_the_vocabulary_says_the_least() -> None:
    target = tiny_target("llama")
    least = count_parameters(design_draft(target, DesignConfig(hidden_size=32)))
    with pytest.raises(FastDraftError, match=rf"params: 5 cannot hold .*32 wide, is {least:,}$"):
        design_draft(target, DesignConfig(params=5))
    exact = DesignConfig(params=least)
    assert design_draft(target, exact).hidden_size == 32


@pytest.mark.parametrize("multiple", [128, 33])
def test_no_width_at_all_is_an_error_for_the_user(multiple: int) -> None:
    # 128 is wider than the target; 33 does not divide into its heads.
    heads = {"num_attention_heads": 8, "num_key_value_heads": 1}
    with pytest.raises(FastDraftError, match="design"):
        design_draft(tiny_target("llama", **heads), DesignConfig(width_multiple=multiple))


def test_never_wider_or_deeper_than_the_target() -> None:
    target = tiny_target("llama")
    with pytest.raises(FastDraftError, match=r"hidden_size: 96 is wider than the target's 64"):
        design_draft(target, DesignConfig(hidden_size=96))
    with pytest.raises(FastDraftError, match=r"num_hidden_layers: 6 is deeper than the target's 5"):
        design_draft(target, DesignConfig(num_hidden_layers=6))
    everything = DesignConfig(params=10**9, num_hidden_layers=5)
    assert count_parameters(design_draft(target, everything)) == count_parameters(target)


@pytest.mark.parametrize("width", [0, -32])
def test_a_width_of_nothing_is_refused(width: int) -> None:
    with pytest.raises(FastDraftError, match="hidden_size"):
        design_draft(tiny_target("llama"), DesignConfig(hidden_size=width))


def test_a_width_that_does_not_divide_into_its_heads() -> None:
    with pytest.raises(FastDraftError, match=r"hidden_size: 33 is no multiple of the 2 attention"):
        design_draft(tiny_target("llama"), DesignConfig(hidden_size=33))


def test_slices_keep_the_inner_widths() -> None:
    config = design_draft(tiny_target("llama"), DesignConfig(hidden_size=32))
    assert (config.intermediate_size, config.num_key_value_heads) == (160, 4)
    narrow = design_draft(
        tiny_target("llama"), DesignConfig(hidden_size=32, first_weights="project")
    )
    assert (narrow.intermediate_size, narrow.num_key_value_heads) == (64, 2)


def test_slices_cannot_be_wider_inside_than_the_target() -> None:
    with pytest.raises(FastDraftError, match="intermediate_size"):
        design_draft(tiny_target("llama"), DesignConfig(hidden_size=32, intermediate_size=192))


def test_a_given_feed_forward_width_is_taken() -> None:
    config = design_draft(tiny_target("llama"), DesignConfig(hidden_size=32, intermediate_size=48))
    assert config.intermediate_size == 48


def test_lists_with_an_entry_a_layer_are_thinned() -> None:
    target = tiny_target("smollm3")
    target.no_rope_layers = [1, 0, 1, 0, 1]
    config = design_draft(target, DesignConfig(hidden_size=32, num_hidden_layers=3))
    assert config.no_rope_layers == [1, 1, 1]
    assert len(config.layer_types) == 3


@given(st.integers(1, 100).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n))))
def test_kept_layers(sizes: tuple[int, int]) -> None:
    total, kept = sizes
    layers = kept_layers(total, kept)
    assert len(layers) == kept == len(set(layers))
    assert layers == sorted(layers)
    assert layers[0] == 0
    if kept > 1:
        assert layers[-1] == total - 1
        gaps = [b - a for a, b in itertools.pairwise(layers)]
        assert max(gaps) - min(gaps) <= 1 or total < 2 * kept


@pytest.mark.parametrize("name", ["params", "num_hidden_layers", "width_multiple"])
def test_config_refuses_nothing(name: str) -> None:
    with pytest.raises(FastDraftError, match=f"^{name}: must be at least 1, got 0"):
        DesignConfig(**{name: 0})
