"""A draft's weights before training: random, or with what the target knows put in.

A draft is mostly vocabulary, so what its embeddings know at the start decides how much a small
token budget gives. ``project`` gives each token the position that the target gives it, as far as
the draft's width can hold it; ``slice`` also cuts some of the target's layers to that width, in
the way SliceGPT does (Ashkboos et al. 2024, arXiv 2401.15024).

A transformer with RMSNorm does not change when its hidden states are rotated and every weight that
reads or writes them is rotated with them. So the hidden states x [D] are taken to y = Bᵀ·diag(s)·x
[d], with B [D, d] the principal directions of the vocabulary, and what lies outside them is lost.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fastdraft_hf.drafts.config import DesignConfig
from fastdraft_hf.drafts.design import kept_layers

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel

# Standard deviation of the first logits for a hidden state of unit RMS: sharp enough to learn
# from, flat enough not to be confidently wrong.
LOGIT_SPREAD = 2.0


class Basis(NamedTuple):
    """From the target's hidden states to the draft's.

    Attributes:
        directions: B, [D, d], orthonormal columns.
        scale: s, [D].
        share: how much of the vocabulary's sum of squares the directions hold.
    """

    directions: torch.Tensor
    scale: torch.Tensor
    share: float


def first_weights(
    target: Path, config: PretrainedConfig, design: DesignConfig, seed: int
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Build a draft in float32 with its first weights.

    Args:
        target: the target's folder; not read for ``scratch``.
        config: the draft's config.
        design: which first weights.
        seed: of the random ones.

    Returns:
        the draft, and facts about how it was made.
    """
    import torch
    from transformers import AutoModelForCausalLM, set_seed

    set_seed(seed)
    draft = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    facts: dict[str, Any] = {"first_weights": design.first_weights}
    if design.first_weights != "scratch":
        model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
        basis = vocabulary_basis(model, config.hidden_size)
        facts["explained_variance"] = round(basis.share, 4)
        project_vocabulary(model, draft, basis)
        if design.first_weights == "slice":
            layers = kept_layers(model.config.num_hidden_layers, config.num_hidden_layers)
            slice_layers(model, draft, basis, layers)
            facts["layers_of_the_target"] = layers
    draft.config.dtype = "float32"
    return draft, facts


def vocabulary_basis(target: PreTrainedModel, width: int) -> Basis:
    """Return the basis of a draft of ``width`` for ``target``.

    With E [V, D] the head and g [D] the gain of the final norm, the head sees E·diag(g). Tied
    embeddings are read at both ends, which E·diag(√|g|) serves at once, so s = √|g| then; an
    untied head takes g itself and leaves the hidden states as they are, s = 1.
    """
    import torch

    with torch.no_grad():
        gain = _decoder(target).norm.weight.float().abs().clamp_min(1e-4)
        head = target.get_output_embeddings().weight.float()
        scale = gain.sqrt() if _tied(target) else torch.ones_like(gain)
        # An RMSNorm takes a common factor out again, so only the differences may remain.
        scale = scale / scale.square().mean().sqrt()
        table = head * (scale if _tied(target) else gain)
        values, vectors = torch.linalg.eigh((table.T @ table).double())
    share = float(values[-width:].sum() / values.sum())
    return Basis(vectors.flip(1)[:, :width].float(), scale, share)


def project_vocabulary(target: PreTrainedModel, draft: PreTrainedModel, basis: Basis) -> None:
    """Set the draft's embeddings, head and final gain from the target's, in ``basis``."""
    import torch

    with torch.no_grad():
        head = target.get_output_embeddings().weight.float()
        if not _tied(target):
            head = head * _decoder(target).norm.weight.float()
            embeddings = target.get_input_embeddings().weight.float()
            draft.get_input_embeddings().weight.copy_(embeddings @ basis.directions)
        table = (head * basis.scale) @ basis.directions
        draft.get_output_embeddings().weight.copy_(table)
        spread = float(table.std()) * math.sqrt(table.shape[1])
        _decoder(draft).norm.weight.fill_(LOGIT_SPREAD / spread)


def slice_layers(
    target: PreTrainedModel, draft: PreTrainedModel, basis: Basis, layers: list[int]
) -> None:
    """Set the draft's layers from ``layers`` of the target, cut to the draft's widths.

    The gains of the norms go into the projections behind them. Of the heads the first whole
    groups are kept, of the feed-forward the channels with the largest weights.
    """
    import torch

    with torch.no_grad():
        for ours, index in zip(_decoder(draft).layers, layers, strict=True):
            theirs = _decoder(target).layers[index]
            _slice_attention(ours, theirs, basis)
            _slice_feed_forward(ours, theirs, basis)
            ours.input_layernorm.weight.fill_(1.0)
            ours.post_attention_layernorm.weight.fill_(1.0)


def _slice_attention(ours: Any, theirs: Any, basis: Basis) -> None:
    directions, scale, _ = basis
    gain = theirs.input_layernorm.weight.float() / scale
    for name in ("q_proj", "k_proj", "v_proj"):
        to, source = getattr(ours.self_attn, name), getattr(theirs.self_attn, name)
        rows = to.weight.shape[0]
        to.weight.copy_(((source.weight.float() * gain) @ directions)[:rows])
        if source.bias is not None:
            to.bias.copy_(source.bias[:rows])
    for name in ("q_norm", "k_norm"):  # of the size of a head, which the draft keeps
        if hasattr(ours.self_attn, name):
            getattr(ours.self_attn, name).load_state_dict(
                getattr(theirs.self_attn, name).state_dict()
            )
    back = ours.self_attn.o_proj.weight
    output = scale[:, None] * theirs.self_attn.o_proj.weight.float()
    back.copy_((directions.T @ output)[:, : back.shape[1]])
    if theirs.self_attn.o_proj.bias is not None:
        bias = directions.T @ (scale * theirs.self_attn.o_proj.bias.float())
        ours.self_attn.o_proj.bias.copy_(bias)


def _slice_feed_forward(ours: Any, theirs: Any, basis: Basis) -> None:
    directions, scale, _ = basis
    gain = theirs.post_attention_layernorm.weight.float() / scale
    up, down = theirs.mlp.up_proj.weight.float(), theirs.mlp.down_proj.weight.float()
    size = ours.mlp.up_proj.weight.shape[0]
    weight = down.norm(dim=0) * up.norm(dim=1)
    kept = weight.topk(size).indices.sort().values
    for name in ("gate_proj", "up_proj"):
        source = getattr(theirs.mlp, name).weight.float() * gain
        getattr(ours.mlp, name).weight.copy_((source @ directions)[kept])
        if getattr(theirs.mlp, name).bias is not None:
            getattr(ours.mlp, name).bias.copy_(getattr(theirs.mlp, name).bias[kept])
    ours.mlp.down_proj.weight.copy_(directions.T @ (scale[:, None] * down[:, kept]))
    if theirs.mlp.down_proj.bias is not None:
        ours.mlp.down_proj.bias.copy_(directions.T @ (scale * theirs.mlp.down_proj.bias.float()))


def _decoder(model: PreTrainedModel) -> Any:
    return model.get_decoder()


def _tied(model: PreTrainedModel) -> bool:
    return bool(model.config.get_text_config().tie_word_embeddings)
