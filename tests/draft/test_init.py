import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from draft_targets import DENSE, randomised, tiny_target
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from fastdraft_hf._errors import FastDraftError
from fastdraft_hf.draft.build import initialize
from fastdraft_hf.draft.config import DesignConfig
from fastdraft_hf.draft.cutting import (
    cut_layers,
    final_norm,
    gain_of,
    kept_layers,
    project_vocabulary,
    set_gain,
    vocabulary_basis,
)
from fastdraft_hf.draft.design import design_draft
from fastdraft_hf.draft.families import FAMILIES, head_groups, head_size

Make = Callable[..., Any]


def weights_equal(a: Any, b: Any) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def test_scratch_reads_no_target_and_project_leaves_its_layers(
    tiny_target_folder: Path, tiny_config: Make, tmp_path: Path
) -> None:
    drafts = []
    for kind, folder, seed in (
        ("scratch", tmp_path / "nowhere", 1),
        ("scratch", tmp_path / "nowhere", 2),
        ("project", tiny_target_folder, 1),
        ("project", tiny_target_folder, 1),
    ):
        design = DesignConfig(hidden_size=16, num_hidden_layers=2, init=kind)
        drafts.append(initialize(folder, design_draft(tiny_config(), design), design, seed))
    (scratch, facts), (other, _), (project, told), (again, _) = drafts
    assert facts == {"init": "scratch"}
    assert told["init"] == "project"
    assert 0 < told["explained_variance"] < 1
    assert not weights_equal(scratch, other)
    assert weights_equal(project, again)
    assert weights_equal(project.model.layers, scratch.model.layers)
    assert not torch.equal(project.lm_head.weight, scratch.lm_head.weight)
    assert project.lm_head.weight is project.model.embed_tokens.weight


@given(width=st.integers(1, 32), seed=st.integers(0, 20), tied=st.booleans())
def test_the_basis_is_the_best_one(tiny_model: Make, width: int, seed: int, tied: bool) -> None:
    target = tiny_model(seed=seed, tie_word_embeddings=tied)
    torch.manual_seed(seed)
    target.model.norm.weight.data = torch.rand(32) + 0.5
    target.model.norm.weight.data[::5] *= -1  # training makes some gains negative
    hidden = vocabulary_basis(target, width)
    directions, scale, share = hidden.directions, hidden.scale, hidden.share
    torch.testing.assert_close(directions.T @ directions, torch.eye(width), atol=1e-5, rtol=0)
    gains = target.model.norm.weight.detach().abs()
    table = target.lm_head.weight.detach() * (gains.sqrt() if tied else gains)
    # The root of the gain, of mean square 1: an RMSNorm takes a common factor out again.
    root = gains.sqrt() / gains.mean().sqrt()
    torch.testing.assert_close(scale, root if tied else torch.ones_like(gains))
    best = torch.linalg.svdvals(table.double()).square()
    assert share == pytest.approx(float(best[:width].sum() / best.sum()), rel=1e-4)
    kept = (table @ directions).square().sum() / table.square().sum()
    assert float(kept) == pytest.approx(share, rel=1e-4)


def made(target: Any, folder: Path, **section: Any) -> tuple[Any, dict[str, Any]]:
    """Return the draft of a model that is saved first, and the facts about it."""
    target.save_pretrained(folder)
    design = DesignConfig(**section)
    return initialize(folder, design_draft(target.config, design), design, seed=0)


ROTATED = [name for name in DENSE if FAMILIES[name].pre_norms]


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        *((family, {"tie_word_embeddings": tied}) for family in ROTATED for tied in (True, False)),
        ("llama", {"tie_word_embeddings": False, "attention_bias": True}),
        ("llama", {"tie_word_embeddings": False, "mlp_bias": True}),
    ],
)
def test_a_whole_rotation_is_the_target(family: str, changes: dict[str, bool]) -> None:
    # A rotation changes nothing: up to the head's one factor, the draft is the target.
    target = randomised(tiny_target(family, **changes), seed=1)
    if changes["tie_word_embeddings"]:
        final_norm(target).weight.data.fill_(0.7)  # an even gain leaves the tied basis a rotation
    draft = AutoModelForCausalLM.from_config(target.config, dtype=torch.float32).eval()
    hidden = vocabulary_basis(target, target.config.hidden_size)
    project_vocabulary(target, draft, hidden)
    cut_layers(target, draft, hidden, range(target.config.num_hidden_layers))
    ids = torch.randint(0, 90, (2, 17), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, theirs = draft(ids).logits, target(ids).logits
    torch.testing.assert_close(ours / ours.norm(), theirs / theirs.norm(), atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("size", [160, 100])
@pytest.mark.parametrize("family", ROTATED)
def test_a_rotated_cut(family: str, size: int, tied: bool, tmp_path: Path) -> None:
    target = randomised(tiny_target(family, tie_word_embeddings=tied), seed=2)
    section = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": size}
    draft, facts = made(target, tmp_path, **section)
    index = kept_layers(target.config, 2)[1]
    assert facts["layers_of_the_target"] == [0, index]
    # The feed-forward channels kept are whole ones of the target, of its largest.
    layer, ours = target.model.layers[index], draft.model.layers[1].mlp
    fused = hasattr(layer.mlp, "gate_up_proj")
    up = layer.mlp.gate_up_proj.weight[160:] if fused else layer.mlp.up_proj.weight
    weight = layer.mlp.down_proj.weight.norm(dim=0) * up.norm(dim=1)
    kept = weight.topk(size).indices.sort().values
    hidden = vocabulary_basis(target, 32)
    pre_norms: Any = FAMILIES[family].pre_norms
    gain = gain_of(getattr(layer, pre_norms[1]), up)
    expected = (up * gain / hidden.scale)[kept] @ hidden.directions
    cut = ours.gate_up_proj.weight[size:] if fused else ours.up_proj.weight
    torch.testing.assert_close(cut, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("layers", [[0, 1, 2], [0, 2]])
@pytest.mark.parametrize("family", DENSE)
def test_at_full_width_layers_are_dropped_and_nothing_else(
    family: str, layers: list[int], tmp_path: Path
) -> None:
    target = randomised(tiny_target(family), seed=4)
    section = {"hidden_size": 64, "num_hidden_layers": len(layers), "layers": layers}
    draft, facts = made(target, tmp_path, **section)
    assert facts["layers_of_the_target"] == layers
    theirs = target.state_dict()
    for name, value in draft.state_dict().items():
        own = name if len(layers) == 3 else name.replace("layers.1.", "layers.2.")
        torch.testing.assert_close(value, theirs[own])
    if len(layers) == 3:
        ids = torch.tensor([[1, 9, 30, 4, 77]])
        with torch.no_grad():
            torch.testing.assert_close(draft.eval()(ids).logits, target(ids).logits)


WRITERS = ("o_proj.weight", "attention.dense.weight", "self_attn.dense.weight")


def rows_of(some: torch.Tensor, every: torch.Tensor) -> bool:
    """Whether each row of ``some`` is a row of ``every``."""
    return bool(torch.isclose(some[:, None], every[None]).all(-1).any(1).all())


CHANNELS = [name for name in DENSE if not FAMILIES[name].pre_norms]


@pytest.mark.parametrize("family", CHANNELS)
def test_other_families_keep_channels(family: str, tmp_path: Path) -> None:
    target = randomised(tiny_target(family, tie_word_embeddings=False), seed=5)
    draft, facts = made(target, tmp_path, hidden_size=32, num_hidden_layers=1)
    assert "explained_variance" not in facts
    wide, narrow = target.get_input_embeddings().weight, draft.get_input_embeddings().weight
    factor = 2**0.5 if FAMILIES[family].scaled_embeddings else 1.0
    same = torch.isclose(wide[:, :, None] * factor, narrow[:, None, :]).all(0)
    channels = same.float().argmax(0)
    assert same.any(0).all()
    assert channels.tolist() == sorted(set(channels.tolist()))
    # The head and every projection are read at the same channels.
    torch.testing.assert_close(
        draft.get_output_embeddings().weight, target.get_output_embeddings().weight[:, channels]
    )
    index = facts["layers_of_the_target"][0]
    theirs = dict(target.get_decoder().layers[index].named_parameters())
    for name, value in draft.get_decoder().layers[0].named_parameters():
        if name.endswith(WRITERS):
            assert rows_of(value.T, theirs[name][channels].T)
        elif name.endswith(("q_proj.weight", "query_key_value.weight")):
            assert rows_of(value, theirs[name][:, channels])
        elif "layernorm" in name and "attn" not in name.replace("post_self_attn", ""):
            torch.testing.assert_close(value, theirs[name][channels])


@pytest.mark.parametrize("family", ["llama", "phi3", "glm4", "qwen3", "phi"])
def test_heads_that_write_nothing_are_the_ones_to_go(family: str, tmp_path: Path) -> None:
    """With most heads silent, a draft without them computes what its target computes."""
    target = randomised(tiny_target(family), seed=6)
    config = design_draft(
        target.config, DesignConfig(hidden_size=64, num_hidden_layers=3, layers=[0, 1, 2])
    )
    groups, size = head_groups(target.config), head_size(target.config)
    each = 8 // groups  # one head of every second group speaks
    silent = [n for n in range(8) if n // each % 2 or n % each != each - 1]
    with torch.no_grad():
        for name, weight in target.named_parameters():
            if name.endswith(WRITERS):
                weight.unflatten(1, (8, size))[:, silent] = 0
    config.num_attention_heads = config.num_key_value_heads = groups // 2
    target.save_pretrained(tmp_path)
    design = DesignConfig(num_hidden_layers=3, layers=[0, 1, 2], init="prune")
    draft, _ = initialize(tmp_path, config, design, seed=0)
    ids = torch.tensor([[1, 9, 30, 4, 77]])
    with torch.no_grad():
        torch.testing.assert_close(draft.eval()(ids).logits, target(ids).logits)


@pytest.mark.parametrize("family", DENSE)
def test_gains_are_read_and_set_as_the_norm_means_them(family: str) -> None:
    model = randomised(tiny_target(family), seed=6)
    norm = final_norm(model)
    states = torch.randn(4, 64)
    states = states - states.mean(-1, keepdim=True)
    plain = states / states.square().mean(-1, keepdim=True).sqrt()
    bias = getattr(norm, "bias", None)
    shift = 0 if bias is None else bias
    with torch.no_grad():
        torch.testing.assert_close(
            norm(states) - shift, plain * gain_of(norm, states), atol=1e-3, rtol=1e-3
        )
        if set_gain(norm, 0.25):
            torch.testing.assert_close(norm(states), plain * 0.25, atol=1e-3, rtol=1e-3)
        else:
            assert family == "olmo"


@pytest.mark.parametrize(("kept", "chosen"), [(1, [2]), (2, [0, 2]), (3, [0, 1, 2])])
def test_the_first_layers_see_past_their_window(kept: int, chosen: list[int]) -> None:
    kinds = ["sliding_attention", "sliding_attention", "full_attention"] * 2
    target = tiny_target("gemma3_text", num_hidden_layers=6, layer_types=kinds)
    assert kept_layers(target, kept, first=True) == chosen


def with_donor(target: Path, tokenizer: Any, rows: int, **section: Any) -> tuple[Any, Any, Any]:
    """Return a draft with layers of a random Qwen3, the donor, and the facts."""
    donor, tied = target.parent / "donor", section.pop("tied", True)
    if not donor.exists():
        config = tiny_target("qwen3", vocab_size=rows, tie_word_embeddings=tied)
        randomised(config, seed=8).save_pretrained(donor)
        tokenizer.save_pretrained(donor)
    section = {"hidden_size": 64, "num_hidden_layers": 1, "donor": str(donor), **section}
    design = DesignConfig(**section)
    config = design_draft(AutoConfig.from_pretrained(target), design)
    draft, facts = initialize(target, config, design, seed=0)
    return draft, AutoModelForCausalLM.from_pretrained(donor), facts


@pytest.fixture
def target(tiny_target_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_target_folder, tmp_path / "target"))


def test_layers_of_another_model_of_the_vocabulary(target: Path, tiny_tokenizer: Any) -> None:
    draft, donor, facts = with_donor(target, tiny_tokenizer, len(tiny_tokenizer))
    assert (draft.config.model_type, facts["donor"]) == ("qwen3", "donor")
    ours, theirs = draft.model.layers[0], donor.model.layers[0]
    assert torch.equal(ours.mlp.up_proj.weight, theirs.mlp.up_proj.weight)
    assert torch.equal(draft.lm_head.weight, donor.lm_head.weight)


@pytest.mark.parametrize("rows", [272 + 40, 272 + 16])
def test_a_padded_donor_is_resized_on_request(
    target: Path, tiny_tokenizer: Any, tiny_config: Make, rows: int
) -> None:
    randomised(tiny_config(vocab_size=rows + 8), seed=9).save_pretrained(target)
    message = rf"design.donor: .*{rows + 8:,} and {rows:,} ids: pad"
    with pytest.raises(FastDraftError, match=message):
        with_donor(target, tiny_tokenizer, rows, tied=False)
    draft, donor, _ = with_donor(target, tiny_tokenizer, rows, resize=True)
    theirs = donor.lm_head.weight
    assert draft.lm_head.weight.shape[0] == rows + 8 == draft.config.vocab_size
    torch.testing.assert_close(draft.lm_head.weight[:rows], theirs)
    torch.testing.assert_close(draft.lm_head.weight[rows:], theirs.mean(0).expand(8, -1))


@pytest.mark.parametrize("tied", [True, False])
def test_a_transplant_gives_each_token_its_pieces(
    target: Path, tiny_tokenizer: Any, other_tokenizer: Any, tied: bool
) -> None:
    rows = len(other_tokenizer)
    draft, donor, facts = with_donor(target, other_tokenizer, rows, init="transplant", tied=tied)
    assert sum(facts["tokens"].values()) == len(tiny_tokenizer) == draft.config.vocab_size
    assert facts["tokens"]["none"] == 0
    assert (draft.config.eos_token_id, draft.config.bos_token_id) == (2, 1)
    theirs, ours = tiny_tokenizer.get_vocab(), other_tokenizer.get_vocab()
    pieces = other_tokenizer.encode("the", add_special_tokens=False)
    for get in ("get_input_embeddings", "get_output_embeddings"):
        mine, table = getattr(draft, get)().weight, getattr(donor, get)().weight
        # " the" is one token of the target; the donor spells it "▁t" and "he", or so.
        torch.testing.assert_close(mine[theirs["Ġthe"]], table[pieces].mean(0))
        torch.testing.assert_close(mine[theirs["a"]], table[ours["a"]])
        torch.testing.assert_close(mine[theirs["<|im_end|>"]], table[ours["</s>"]])
    assert (draft.lm_head.weight is draft.model.embed_tokens.weight) is tied
