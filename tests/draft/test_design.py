from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from draft_targets import DENSE, PUBLISHED, published, tiny_target
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, GPT2Config

from fastdraft_hf._errors import FastDraftError
from fastdraft_hf.draft.config import DesignConfig, Initialization
from fastdraft_hf.draft.cutting import kept_layers
from fastdraft_hf.draft.design import default_budget, design_draft
from fastdraft_hf.draft.families import (
    FAMILIES,
    count_parameters,
    dense_config,
    head_groups,
    head_size,
    read_parameters,
    text_config,
)
from fastdraft_hf.recipe import read_recipe


def check_bounds(config: Any, target: Any, kind: str) -> None:
    """A designed shape is one that hardware and training like, whatever the target's is."""
    step = 64 if target.hidden_size >= 512 else 2 ** ((target.hidden_size // 8).bit_length() - 1)
    width, inner, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
    assert width % step == 0 or width == target.hidden_size
    assert heads * head_size(config) <= 2 * width
    assert min(2 * width, target.intermediate_size) <= inner <= 6 * width
    assert inner % step == 0 or inner == target.intermediate_size
    assert width % heads == 0
    assert heads % head_groups(config) == 0
    if FAMILIES[config.model_type].own_head_size or kind == "prune":
        assert head_size(config) == head_size(target)


@given(
    family=st.sampled_from(DENSE),
    kind=st.sampled_from(["scratch", "prune"]),
    budget=st.integers(20_000, 200_000) | st.none(),
    layers=st.integers(1, 6),
    groups=st.sampled_from([(8, 4), (14, 2), (12, 4), (9, 3), (16, 16), (6, 1)]),
    tied=st.booleans(),
)
@settings(max_examples=60)
def test_no_design_leaves_its_bounds(
    family: str,
    kind: Initialization,
    budget: int | None,
    layers: int,
    groups: tuple[int, int],
    tied: bool,
) -> None:
    own = FAMILIES[family].own_head_size
    heads, pairs = groups if own else (8, 8)
    target = tiny_target(
        family,
        vocab_size=384,
        hidden_size=16 * heads,
        intermediate_size=48 * heads,
        num_hidden_layers=6,
        num_attention_heads=heads,
        num_key_value_heads=pairs,
        tie_word_embeddings=tied,
        **({"head_dim": 16} if own else {}),
    )
    wanted = DesignConfig(params=budget, num_hidden_layers=layers, init=kind)
    try:
        config = design_draft(target, wanted)
    except FastDraftError as error:
        assert budget is not None
        assert int(str(error).rsplit(" ", 1)[1].replace(",", "")) > budget  # noqa: PT017
        return
    check_bounds(config, target, kind)
    if budget is not None:
        assert count_parameters(config) <= 1.02 * budget


@pytest.mark.parametrize(
    ("name", "params", "layers"),
    [
        ("phi-3-mini-4k-instruct", 50_000_000, 4),
        ("phi-3-mini-4k-instruct", 120_000_000, 6),
        ("llama-3.1-8b-instruct", 150_000_000, 4),
    ],
)
def test_the_drafts_of_the_paper(name: str, params: int, layers: int) -> None:
    target = published(name)
    config = design_draft(
        target, DesignConfig(params=params, num_hidden_layers=layers, init="scratch")
    )
    # The paper's drafts are 76, 32 and 53 times smaller.
    ratio = count_parameters(target) / count_parameters(config)
    assert ratio == pytest.approx({50: 76, 120: 32, 150: 53}[params // 10**6], rel=0.05)


PUBLISHED_NAMES = sorted(path.stem for path in PUBLISHED.glob("*.json"))


@pytest.mark.parametrize("params", ["50M", "150M", None])
@pytest.mark.parametrize("name", PUBLISHED_NAMES)
def test_published_targets(name: str, params: Any) -> None:
    target = published(name)
    text = text_config(target)
    mixture = FAMILIES[text.model_type].dense
    layers = 4
    wanted = DesignConfig(params=params, num_hidden_layers=layers)
    if mixture:
        with pytest.raises(FastDraftError, match=r"init: prune .*use project"):
            design_draft(target, wanted.model_copy(update={"init": "prune"}))
    config = design_draft(target, wanted)
    check_bounds(config, dense_config(text), "project" if mixture else "prune")
    size = count_parameters(config)
    if params is not None:  # a width of 64 more may be a third of a small budget
        most = count_parameters(dense_config(text))
        assert 0.5 * min(wanted.params or 0, most / 4) < size <= 1.02 * (wanted.params or 0)
    else:  # the least draft of a small target with a large vocabulary exceeds its share
        share = read_parameters(config) / default_budget(target)
        assert 0.7 < share <= 1.07 or (share < 1.75 and config.hidden_size == head_size(text) // 2)
    assert config.model_type == (mixture or text.model_type)
    same = ["vocab_size", "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id"]
    if text.model_type == "granite":
        same += [f"{field}_multiplier" for field in ("embedding", "attention", "residual")]
        same.append("logits_scaling")
    for field in [*same, "rope_parameters"]:
        assert getattr(config, field) == getattr(text, field), field
    for field in ("layer_types", "no_rope_layers"):
        assert len(getattr(config, field, None) or range(layers)) == layers
    types = getattr(config, "layer_types", None)
    assert types is None or "full_attention" in types
    assert not hasattr(config, "quantization_config")


def test_the_count_of_published_models_is_theirs() -> None:
    # Millions of parameters, from the models' pages: the fixtures are these models.
    for name, millions in {
        "llama-3.1-8b-instruct": 8030,
        "llama-3.1-70b-instruct": 70_554,
        "phi-3-mini-4k-instruct": 3821,
        "qwen2.5-7b-instruct": 7616,
        "qwen3-0.6b": 596,
        "gemma-2-2b-it": 2614,
        "gemma-3-270m-it": 268,
        "granite-3.1-2b-instruct": 2534,
        "pythia-1b": 1012,
    }.items():
        assert count_parameters(published(name)) / 1e6 == pytest.approx(millions, rel=0.002), name


def test_the_design_of_from_nothing_stays(target_folder: Path) -> None:
    # Its figures are in the README; a change of the rule that changes them must be seen.
    recipe = read_recipe(Path(__file__).parents[2] / "recipes/smollm2-135m/from-nothing.yaml")
    config = design_draft(AutoConfig.from_pretrained(target_folder), recipe.design)
    shape = (config.hidden_size, config.intermediate_size, config.num_attention_heads)
    assert shape == (192, 1152, 6)


def test_a_budget_below_the_vocabulary_says_the_least() -> None:
    target = tiny_target("llama")
    narrow = DesignConfig(hidden_size=8, intermediate_size=16)
    least = count_parameters(design_draft(target, narrow))
    with pytest.raises(FastDraftError, match=rf"params: 5 cannot hold .*8 wide, is {least:,}$"):
        design_draft(target, DesignConfig(params=5))
    with pytest.raises(FastDraftError, match="cannot hold"):
        design_draft(target, DesignConfig(params=int(0.97 * least)))
    found = count_parameters(design_draft(target, DesignConfig(params=least)))
    assert found == least


def test_groups_of_seven_lose_heads() -> None:
    wanted = DesignConfig(params=150_000_000, num_hidden_layers=2)
    config = design_draft(published("qwen2.5-7b-instruct"), wanted)  # 28 heads in 4 groups
    assert (config.hidden_size, config.num_attention_heads, head_groups(config)) == (448, 7, 1)
    narrow = design_draft(published("qwen2.5-7b-instruct"), DesignConfig(params="50M"))
    assert (narrow.hidden_size, narrow.num_attention_heads, head_groups(narrow)) == (128, 2, 1)


LLAMA = tiny_target("llama")


@pytest.mark.parametrize(
    ("target", "section", "message"),
    [
        (LLAMA, {"hidden_size": 96}, "hidden_size: 96 is more than the target's 64"),
        (
            tiny_target("llama"),
            {"num_hidden_layers": 4},
            "num_hidden_layers: 4 is more than the target's 3",
        ),
        (LLAMA, {"intermediate_size": 192}, "intermediate_size: 192 is more than"),
        (
            tiny_target("llama"),
            {"layers": [1, 5]},
            "design.layers: there is no layer 5; the last of 3",
        ),
        (published("pythia-1b"), {"hidden_size": 320}, "320 cannot be divided among .* size 256"),
        (GPT2Config(), {}, "family 'gpt2' has no draft design yet.*llama"),
    ],
)
def test_a_shape_that_cannot_be_is_one_line(
    target: Any, section: dict[str, Any], message: str
) -> None:
    with pytest.raises(FastDraftError, match=message):
        design_draft(target, DesignConfig(**section))


def test_a_budget_beyond_the_target_gives_the_target() -> None:
    target = tiny_target("llama")
    everything = DesignConfig(params=10**9, num_hidden_layers=3)
    assert count_parameters(design_draft(target, everything)) == count_parameters(target)


@pytest.mark.parametrize(
    ("section", "inner", "groups"),
    [({}, 160, 4), ({"init": "project"}, 80, 2), ({"intermediate_size": 48}, 48, 4)],
)
def test_cut_layers_keep_the_inner_widths(section: dict[str, Any], inner: int, groups: int) -> None:
    config = design_draft(tiny_target("llama"), DesignConfig(hidden_size=32, **section))
    assert (config.intermediate_size, config.num_key_value_heads) == (inner, groups)


@pytest.mark.parametrize(
    ("section", "kept"),
    [({"num_hidden_layers": 3}, [1, 1, 1]), ({"num_hidden_layers": 2, "layers": [1, 4]}, [0, 1])],
)
def test_lists_with_an_entry_per_layer_follow_the_layers(
    section: dict[str, Any], kept: list[int]
) -> None:
    target = tiny_target("smollm3", num_hidden_layers=5, no_rope_layers=[1, 0, 1, 0, 1])
    config = design_draft(target, DesignConfig(hidden_size=32, **section))
    assert config.no_rope_layers == kept
    assert len(config.layer_types) == len(kept)


@given(st.integers(1, 100).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n))))
def test_kept_layers(sizes: tuple[int, int]) -> None:
    total, kept = sizes
    layers = kept_layers(SimpleNamespace(num_hidden_layers=total), kept)
    assert layers == sorted(set(layers))
    assert (len(layers), layers[0]) == (kept, 0)
    assert kept == 1 or layers[-1] == total - 1


@pytest.mark.parametrize(
    "section",
    [{name: 0} for name in ("params", "num_hidden_layers", "hidden_size")]
    + [{"donor": None, "init": "transplant"}, {"donor": "x", "init": "scratch"}]
    + [{"layers": layers} for layers in ([], [1, 1], [3, 0], [-1, 2])]
    + [{"layers": [0], "num_hidden_layers": 2}],
)
def test_a_bad_value_names_its_key(section: dict[str, Any]) -> None:
    with pytest.raises(FastDraftError, match=f"^{next(iter(section))}: "):
        DesignConfig(**section)


@pytest.mark.parametrize(
    ("name", "given", "depth"),
    [
        ("gemma-3-270m-it", {}, 4),  # two more layers read 2.5% more
        ("qwen2.5-0.5b-instruct", {}, 4),
        ("smollm2-135m-instruct", {}, 2),  # 15%
        ("llama-3.1-8b-instruct", {}, 2),
        ("gemma-3-270m-it", {"params": "50M"}, 2),  # a budget of one's own is kept
        ("gemma-3-270m-it", {"layers": [0, 5, 11, 16, 17]}, 5),
    ],
)
def test_the_depth_follows_from_what_layers_cost(
    name: str, given: dict[str, Any], depth: int
) -> None:
    draft = design_draft(published(name), DesignConfig(**given))
    assert draft.num_hidden_layers == depth
    two = design_draft(
        published(name), DesignConfig(**{**given, "layers": "even"}, num_hidden_layers=2)
    )
    if not given:
        assert draft.hidden_size == two.hidden_size
        assert read_parameters(draft) <= 1.06 * read_parameters(two)


def test_a_draft_of_a_windowed_target_sees_the_whole_text() -> None:
    target = published("gemma-3-270m-it")  # every sixth layer has full attention
    for layers in range(1, 19):
        design = DesignConfig(hidden_size=320, num_hidden_layers=layers)
        assert "full_attention" in design_draft(target, design).layer_types
