from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from fastdraft_hf._errors import FastDraftError
from fastdraft_hf.drafts.config import DesignConfig, FirstWeights
from fastdraft_hf.drafts.design import SUPPORTED_FAMILIES, design_draft, kept_layers
from fastdraft_hf.drafts.first_weights import first_weights
from fastdraft_hf.drafts.vocabulary_basis import (
    first_weights,
    project_vocabulary,
    slice_layers,
    vocabulary_basis,
)

Make = Callable[..., Any]


def tiny_target(family: str, **changes: Any) -> PretrainedConfig:
    fields: dict[str, Any] = {
        "vocab_size": 96,
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
    return AutoConfig.for_model(family, **{**fields, **changes})


def gram(table: torch.Tensor) -> torch.Tensor:
    """Inner products of the tokens, free of a common factor."""
    products = table.double() @ table.double().T
    return products / products.norm()


def with_gains(model: Any, seed: int = 3) -> Any:
    """Give the final norm gains other than 1, as training does (some of them negative)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        gains = torch.rand(model.model.norm.weight.shape, generator=generator) + 0.5
        gains[::5] *= -1
        model.model.norm.weight.copy_(gains)
    return model


def weights_equal(a: Any, b: Any) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def test_scratch_follows_its_seed(tiny_target_folder: Path, tiny_config: Make) -> None:
    design = DesignConfig(hidden_size=16, num_hidden_layers=1, first_weights="scratch")
    config = design_draft(tiny_config(), design)
    first, facts = first_weights(tiny_target_folder, config, design, seed=1)
    again, _ = first_weights(tiny_target_folder, config, design, seed=1)
    other, _ = first_weights(tiny_target_folder, config, design, seed=2)
    assert facts == {"first_weights": "scratch"}
    assert weights_equal(first, again)
    assert not weights_equal(first, other)
    assert all(p.dtype == torch.float32 for p in first.parameters())


def test_scratch_reads_no_target(tmp_path: Path, tiny_config: Make) -> None:
    design = DesignConfig(hidden_size=16, first_weights="scratch")
    first_weights(tmp_path / "nowhere", design_draft(tiny_config(), design), design, seed=0)


def test_project_is_reproducible_and_told(tiny_target_folder: Path, tiny_config: Make) -> None:
    design = DesignConfig(hidden_size=16, num_hidden_layers=2, first_weights="project")
    config = design_draft(tiny_config(), design)
    first, facts = first_weights(tiny_target_folder, config, design, seed=1)
    again, _ = first_weights(tiny_target_folder, config, design, seed=1)
    scratch_design = DesignConfig(hidden_size=16, first_weights="scratch")
    scratch, _ = first_weights(tiny_target_folder, config, scratch_design, seed=1)
    assert weights_equal(first, again)
    assert facts["first_weights"] == "project"
    assert 0 < facts["explained_variance"] < 1
    assert torch.equal(
        first.model.layers[0].mlp.up_proj.weight, scratch.model.layers[0].mlp.up_proj.weight
    )
    assert not torch.equal(first.lm_head.weight, scratch.lm_head.weight)
    assert first.lm_head.weight is first.model.embed_tokens.weight


@pytest.mark.parametrize("tied", [True, False])
def test_full_width_keeps_inner_products(tiny_model: Make, tied: bool) -> None:
    target = with_gains(tiny_model(seed=4, tie_word_embeddings=tied))
    draft = tiny_model(seed=5, tie_word_embeddings=tied)
    basis = vocabulary_basis(target, 32)
    project_vocabulary(target, draft, basis)
    assert basis.share == pytest.approx(1.0)
    gains = target.model.norm.weight
    factor = gains.abs().sqrt() if tied else gains
    torch.testing.assert_close(
        gram(draft.lm_head.weight), gram(target.lm_head.weight * factor), atol=1e-6, rtol=1e-4
    )
    if tied:
        assert draft.lm_head.weight is draft.model.embed_tokens.weight
        return
    torch.testing.assert_close(
        gram(draft.model.embed_tokens.weight),
        gram(target.model.embed_tokens.weight),
        atol=1e-6,
        rtol=1e-4,
    )
    # What the layers add to an input is read by the head: both must be turned the same way.
    ours = draft.model.embed_tokens.weight @ draft.lm_head.weight.T
    theirs = target.model.embed_tokens.weight @ (target.lm_head.weight * gains).T
    torch.testing.assert_close(ours / ours.norm(), theirs / theirs.norm(), atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("tied", [True, False])
def test_explained_variance_grows_with_width(tiny_model: Make, tied: bool) -> None:
    target = with_gains(tiny_model(tie_word_embeddings=tied))
    shares = [vocabulary_basis(target, width).share for width in range(1, 33)]
    assert all(0 < share <= 1 + 1e-9 for share in shares)
    assert all(a < b for a, b in itertools.pairwise(shares))


@given(width=st.integers(1, 32), seed=st.integers(0, 20), tied=st.booleans())
def test_the_basis_is_the_best_one(tiny_model: Make, width: int, seed: int, tied: bool) -> None:
    target = with_gains(tiny_model(seed=seed, tie_word_embeddings=tied), seed)
    directions, scale, share = vocabulary_basis(target, width)
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


def randomised(config: Any, seed: int) -> Any:
    """A model none of whose parameters, norms and biases included, stands at its default."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn_like(parameter) * 0.2)
            else:
                parameter.copy_(parameter + torch.rand_like(parameter) * 0.5)
    return model


def full_slice(target: Any) -> Any:
    draft = AutoModelForCausalLM.from_config(target.config, dtype=torch.float32).eval()
    basis = vocabulary_basis(target, target.config.hidden_size)
    project_vocabulary(target, draft, basis)
    slice_layers(target, draft, basis, list(range(target.config.num_hidden_layers)))
    return draft


def logits_agree(ours: Any, theirs: Any) -> None:
    ids = torch.randint(0, 90, (2, 17), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        a, b = ours(ids).logits, theirs(ids).logits
    torch.testing.assert_close(a / a.norm(), b / b.norm(), atol=1e-6, rtol=1e-3)


FAMILIES = [f for f in SUPPORTED_FAMILIES if f != "phi3"]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_whole_slice_is_the_target(family: str) -> None:
    # A rotation changes nothing: up to the head's one factor, the draft is the target.
    target = randomised(tiny_target(family, tie_word_embeddings=False), seed=1)
    logits_agree(full_slice(target), target)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_whole_slice_of_a_tied_target(family: str) -> None:
    target = randomised(tiny_target(family, tie_word_embeddings=True), seed=1)
    target.model.norm.weight.data.fill_(0.7)  # an even gain leaves the tied basis a rotation
    logits_agree(full_slice(target), target)


@pytest.mark.parametrize("option", ["attention_bias", "mlp_bias"])
def test_a_whole_slice_with_biases(option: str) -> None:
    target = randomised(tiny_target("llama", tie_word_embeddings=False, **{option: True}), seed=1)
    logits_agree(full_slice(target), target)


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=4)
@given(
    width=st.sampled_from([16, 32, 48]),
    layers=st.integers(1, 5),
    tied=st.booleans(),
    feed_forward=st.sampled_from([None, 32, 100]),
)
def test_slices_of_every_size(
    tmp_path_factory: pytest.TempPathFactory,
    family: str,
    width: int,
    layers: int,
    tied: bool,
    feed_forward: int | None,
) -> None:
    target = randomised(tiny_target(family, tie_word_embeddings=tied), seed=2)
    folder = tmp_path_factory.mktemp("target")
    target.save_pretrained(folder)
    design = DesignConfig(
        hidden_size=width, num_hidden_layers=layers, intermediate_size=feed_forward
    )
    config = design_draft(target.config, design)
    draft, facts = first_weights(folder, config, design, seed=0)
    assert facts["layers_of_the_target"] == kept_layers(5, layers)
    with torch.no_grad():
        assert torch.isfinite(draft(torch.tensor([[1, 2, 3]])).logits).all()
    # The feed-forward channels kept are whole ones of the target, of its largest.
    mlp = target.model.layers[facts["layers_of_the_target"][-1]].mlp
    weight = mlp.down_proj.weight.norm(dim=0) * mlp.up_proj.weight.norm(dim=1)
    size = feed_forward or 160
    kept = weight.topk(size).indices.sort().values
    basis = vocabulary_basis(target, width)
    gain = target.model.layers[facts["layers_of_the_target"][-1]].post_attention_layernorm.weight
    expected = (mlp.gate_proj.weight * gain / basis.scale)[kept] @ basis.directions
    torch.testing.assert_close(
        draft.model.layers[-1].mlp.gate_proj.weight, expected, atol=1e-4, rtol=1e-4
    )


def test_layers_of_another_build_are_refused(tmp_path: Path) -> None:
    target = randomised(tiny_target("phi3"), seed=0)
    target.save_pretrained(tmp_path)
    design = DesignConfig(hidden_size=32)
    with pytest.raises(FastDraftError, match="'phi3' cannot be sliced; use project"):
        first_weights(tmp_path, design_draft(target.config, design), design, seed=0)


@pytest.mark.parametrize("kind", ["project", "slice"])
def test_the_real_target(target_folder: Path, kind: FirstWeights) -> None:
    design = DesignConfig(hidden_size=96, num_hidden_layers=2, first_weights=kind)
    config = design_draft(AutoConfig.from_pretrained(target_folder), design)
    draft, facts = first_weights(target_folder, config, design, seed=0)
    assert 0.3 < facts["explained_variance"] < 1
    assert draft.get_input_embeddings().weight.shape == (49152, 96)
    with torch.no_grad():
        logits = draft(torch.tensor([[1, 9690, 198]])).logits
    assert torch.isfinite(logits).all()
