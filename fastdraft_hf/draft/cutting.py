"""Carry a model's vocabulary and layers over to the widths of a draft of the same family.

Hidden states are carried over in one of three ways: all channels, a choice of channels, or the
principal directions of the vocabulary. A transformer with RMSNorm computes the same function when
its hidden states are rotated and every weight that reads or writes them is rotated too (SliceGPT,
Ashkboos et al. 2024, arXiv 2401.15024). Hidden states x [D] become y = Bᵀ·diag(s)·x [d], where
B [D, d] holds the principal directions. What lies outside them is lost. Attention heads and
feed-forward channels are kept by the size of their weights.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from fastdraft_hf._head import head_of
from fastdraft_hf.draft.families import FAMILIES, head_groups, head_size

# Standard deviation of the initial logits for a hidden state of unit RMS: sharp enough to learn
# from, flat enough not to be confidently wrong.
LOGIT_SPREAD = 2.0


@dataclass(frozen=True)
class Hidden:
    """How hidden states x [D] of a model become those of its draft, y [d].

    Attributes:
        directions: B, [D, d], orthonormal columns; None where channels are kept.
        scale: s, [D].
        share: share of the vocabulary's sum of squares that the directions hold.
        channels: [d], those that are kept; None for all.
    """

    directions: torch.Tensor | None = None
    scale: torch.Tensor | None = None
    share: float = 1.0
    channels: torch.Tensor | None = None

    def read(self, weight: torch.Tensor, gain: torch.Tensor | None = None) -> torch.Tensor:
        """Return a weight [.., D] as [.., d], with the gain of the norm before it folded in."""
        if self.directions is not None and self.scale is not None:
            return (weight if gain is None else weight * (gain / self.scale)) @ self.directions
        return weight if self.channels is None else weight[..., self.channels]

    def write(self, weight: torch.Tensor) -> torch.Tensor:
        """Return a weight [D, ..] as [d, ..]."""
        if self.directions is not None and self.scale is not None:
            scale = self.scale if weight.dim() == 1 else self.scale[:, None]
            return self.directions.T @ (scale * weight)
        return weight if self.channels is None else weight[self.channels]


def vocabulary_basis(target: PreTrainedModel, width: int) -> Hidden:
    """Return the principal directions of the vocabulary for a draft of ``width``.

    With E [V, D] the head's weight and g [D] the gain of the final norm, the head computes with
    E·diag(g). A tied matrix is used at both ends, and E·diag(√|g|) serves both, so s = √|g|. An
    untied head takes g itself and s = 1.
    """
    with torch.no_grad():
        head = target.get_output_embeddings().weight.float()
        gain = gain_of(final_norm(target), head).abs().clamp_min(1e-4)
        scale = gain.sqrt() if tied(target) else torch.ones_like(gain)
        # RMSNorm removes a common factor, so only the differences between channels may remain.
        scale = scale / scale.square().mean().sqrt()
        table = head * (scale if tied(target) else gain)
        values, vectors = torch.linalg.eigh((table.T @ table).double())
    share = float(values[-width:].sum() / values.sum())
    return Hidden(vectors.flip(1)[:, :width].float(), scale, share)


def project_vocabulary(target: PreTrainedModel, draft: PreTrainedModel, hidden: Hidden) -> None:
    """Set the draft's embeddings, head and final gain from the target's, along directions."""
    factor = _embedding_factor(target, draft)
    with torch.no_grad():
        source, ours = target.get_output_embeddings(), draft.get_output_embeddings()
        head = source.weight.float()
        if not tied(target):
            head = head * gain_of(final_norm(target), head)
            embeddings = target.get_input_embeddings().weight.float()
            draft.get_input_embeddings().weight.copy_(factor * hidden.read(embeddings))
        table = factor * hidden.read(head * hidden.scale)
        ours.weight.copy_(table)
        if getattr(source, "bias", None) is not None and getattr(ours, "bias", None) is not None:
            ours.bias.copy_(source.bias)
        spread = float(table.std()) * math.sqrt(table.shape[1])
        gain = LOGIT_SPREAD / (spread * head_of(draft).scale)
        if not set_gain(final_norm(draft), gain) and not tied(draft):
            ours.weight.mul_(gain)


def _embedding_factor(source: PreTrainedModel, draft: PreTrainedModel) -> float:
    """Return what undoes a family's factor of its embeddings, the square root of the width."""
    if not FAMILIES[draft.config.model_type].scaled_embeddings:
        return 1.0
    wide: int = source.config.get_text_config().hidden_size
    return math.sqrt(wide / draft.config.hidden_size)


def decoder_of(model: PreTrainedModel) -> Any:
    """Return the module that holds the layers and the final norm."""
    found = (model.get_decoder(), model.base_model, *model.children())
    return next(module for module in found if hasattr(module, "layers"))


def final_norm(model: PreTrainedModel) -> Any:
    """Return the norm before the head."""
    norms = {name: m for name, m in decoder_of(model).named_children() if "norm" in name}
    return norms.get("norm", list(norms.values())[-1])


def tied(model: PreTrainedModel) -> bool:
    """Return whether embeddings and head share their weight."""
    return bool(model.config.get_text_config().tie_word_embeddings)


def gain_of(norm: Any, table: torch.Tensor) -> torch.Tensor:
    """Return the factors [D] by which a norm multiplies normalized states, in float32.

    Most families store it as ``weight``, Gemma and Nemotron store it minus one. OLMo has none; then
    ``table`` [.., D] gives the width and the device.
    """
    if getattr(norm, "weight", None) is None:
        return torch.ones(table.shape[-1], device=table.device)
    gain: torch.Tensor = norm.weight.detach().float() + _offset(norm)
    return gain


def set_gain(norm: Any, gain: torch.Tensor | float) -> bool:
    """Set the gain of a norm and its bias to 0; return False where the norm has no gain."""
    if getattr(norm, "weight", None) is None:
        return False
    with torch.no_grad():
        value = torch.as_tensor(gain).to(norm.weight) - _offset(norm)
        norm.weight.copy_(value.expand_as(norm.weight))
        if getattr(norm, "bias", None) is not None:
            norm.bias.zero_()
    return True


def _offset(norm: Any) -> float:
    """Return 1 where a weight of 0 means a gain of 1, measured on the norm itself."""
    with torch.no_grad():
        weight = norm.weight
        signs = torch.ones_like(weight)
        # Mean 0 and mean square 1: neither LayerNorm nor RMSNorm changes it.
        signs[..., 1::2] = -1
        gain = (norm(signs[None]) - norm(-signs[None]))[0] / 2 * signs
        return float(round(float((gain - weight).float().median())))


# The rows of a projection that reads hidden states, or the columns of one that writes them: query
# heads, key-value heads, heads with query, key and value side by side, feed-forward channels.
_READS = {
    "q_proj": ("q",),
    **dict.fromkeys(("k_proj", "v_proj"), ("kv",)),
    "qkv_proj": ("q", "kv", "kv"),
    "query_key_value": ("q3",),
    **dict.fromkeys(("gate_proj", "up_proj", "fc1", "c_fc", "dense_h_to_4h"), ("ff",)),
    "gate_up_proj": ("ff", "ff"),
}
_OUT = ("o_proj", "dense")
_DOWN = ("down_proj", "fc2", "c_proj", "dense_4h_to_h")
_WRITES = {**dict.fromkeys(_OUT, "q"), **dict.fromkeys(_DOWN, "ff")}
_UP = ("up_proj", "fc1", "c_fc", "dense_h_to_4h", "gate_up_proj")


def cut_vocabulary(source: PreTrainedModel, draft: PreTrainedModel) -> Hidden:
    """Set the draft's embeddings, head and final norm from the source's; return the map used.

    At the source's own width everything is copied. A narrower draft gets the principal directions
    where the family allows it, else the channels with the largest weights in embeddings and head.
    """
    wide, width = source.config.get_text_config().hidden_size, draft.config.hidden_size
    if width < wide and FAMILIES[draft.config.model_type].pre_norms is not None:
        hidden = vocabulary_basis(source, width)
        project_vocabulary(source, draft, hidden)
        return hidden
    hidden = Hidden(channels=None if width == wide else _largest_channels(source, width))
    factor = _embedding_factor(source, draft)
    with torch.no_grad():
        ours = draft.get_output_embeddings()
        theirs = source.get_output_embeddings()
        ours.weight.copy_(hidden.read(theirs.weight.float()))
        if getattr(ours, "bias", None) is not None:
            ours.bias.copy_(theirs.bias)
        embeddings = hidden.read(source.get_input_embeddings().weight.float())
        draft.get_input_embeddings().weight.copy_(factor * embeddings)
        norm, old = final_norm(draft), final_norm(source)
        # A tied weight carries the factor to the head too, where the gain removes it.
        gain = hidden.read(gain_of(old, theirs.weight)) / (factor if tied(draft) else 1.0)
        if set_gain(norm, gain) and getattr(old, "bias", None) is not None:
            norm.bias.copy_(hidden.read(old.bias.float()))
    return hidden


def _largest_channels(source: PreTrainedModel, width: int) -> torch.Tensor:
    head = source.get_output_embeddings().weight.float()
    head = head * gain_of(final_norm(source), head)
    embeddings = source.get_input_embeddings().weight.float()
    weight = sum(t.square().sum(0) / t.square().sum() for t in (head, embeddings))
    channels: torch.Tensor = weight.topk(width).indices.sort().values
    return channels


def cut_layers(
    source: PreTrainedModel, draft: PreTrainedModel, hidden: Hidden, layers: Sequence[int]
) -> None:
    """Set the draft's layers from ``layers`` of the source, cut to the draft's widths.

    With directions, the gains of the norms go into the projections behind them.
    """
    old, new, all_layers = source.config.get_text_config(), draft.config, decoder_of(source).layers
    with torch.no_grad():
        for ours, index in zip(decoder_of(draft).layers, layers, strict=True):
            _cut_layer(old, new, ours, all_layers[index], hidden)


def _cut_layer(old: Any, new: Any, ours: Any, theirs: Any, hidden: Hidden) -> None:
    size, ratio = head_size(new), new.num_attention_heads // head_groups(new)
    groups, inner = head_groups(old), old.intermediate_size
    heads, kept_groups = _largest_heads(theirs, old, head_groups(new), ratio)

    def rows_of(units: torch.Tensor, each: int) -> torch.Tensor:
        return (units[:, None] * each + torch.arange(each)).flatten()

    kept = {
        "q": rows_of(heads, size),
        "kv": rows_of(kept_groups, size),
        "q3": rows_of(heads, size * 3),
        "ff": _largest_feed_forward(theirs, new.intermediate_size, inner),
    }
    wide = {"q": old.num_attention_heads * size, "kv": groups * size, "q3": 0, "ff": inner}

    def rows(roles: Sequence[str]) -> torch.Tensor:
        """Return the rows of a projection to keep; a fused one has parts one after another."""
        starts = itertools.accumulate((wide[role] for role in roles), initial=0)
        return torch.cat([kept[role] + start for role, start in zip(roles, starts)])  # noqa: B905

    norms: Sequence[str] = ()
    gains: list[torch.Tensor] = []
    if hidden.scale is not None:
        norms = FAMILIES[new.model_type].pre_norms or ()
        gains = [gain_of(getattr(theirs, name), hidden.scale) for name in norms]
    parameters = dict(theirs.named_parameters())
    for name, to in ours.named_parameters():
        weight = parameters[name].float()
        module, _, leaf = name.rpartition(".")
        kind = module.rpartition(".")[2]
        if kind in _READS:
            value = weight[rows(_READS[kind])]
            if leaf == "weight":
                value = hidden.read(value, gains["ff" in _READS[kind]] if gains else None)
        elif kind in _WRITES:
            value = hidden.write(weight)
            value = value[:, kept[_WRITES[kind]]] if leaf == "weight" else value
        elif "norm" in name and "attn." not in name and "attention." not in name:
            if norms:
                continue  # folded into the projections
            value = hidden.read(weight)
        else:  # norms of single heads, and parameters that depend on no width
            value = weight[: to.shape[0]]
        to.copy_(value)
    for name in norms:
        set_gain(getattr(ours, name), 1.0)


def _largest_heads(
    layer: Any, old: Any, groups: int, ratio: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the query heads and the key-value heads to keep, by what they can write.

    A head counts by the norm of its columns in the output projection, a group by its ``ratio``
    largest heads.
    """
    weight = _weight(layer, _OUT).unflatten(1, (head_groups(old), -1, head_size(old)))
    weight = weight.norm(dim=(0, 3))
    best = weight.topk(ratio, 1)
    chosen = best.values.square().sum(1).topk(groups).indices.sort().values
    each = weight.shape[1]
    heads = chosen[:, None] * each + best.indices[chosen].sort(1).values
    return heads.flatten(), chosen


def _weight(layer: Any, names: Sequence[str]) -> Any:
    """Return the float32 weight of the projection that has one of these names."""
    modules = {name.rpartition(".")[2]: module for name, module in layer.named_modules()}
    return next(modules[name].weight.float() for name in names if name in modules)


def _largest_feed_forward(layer: Any, size: int, inner: int) -> torch.Tensor:
    weight = _weight(layer, _DOWN).norm(dim=0) * _weight(layer, _UP)[-inner:].norm(dim=1)
    kept: torch.Tensor = weight.topk(size).indices.sort().values
    return kept


def kept_layers(config: Any, kept: int, *, first: bool = False) -> list[int]:
    """Return ``kept`` layers of a model: evenly spaced with both ends, or the first.

    Where a target mixes sliding windows with full attention and only windows were chosen, a full
    layer replaces the last one: a draft that sees only its window degrades on long texts. It is the
    target's last full layer, or its first with ``first``.
    """
    step = 1 if first else (config.num_hidden_layers - 1) / max(kept - 1, 1)
    chosen = [round(i * step) for i in range(kept)]
    types = getattr(config, "layer_types", None) or []
    full = [i for i, kind in enumerate(types) if kind == "full_attention"]
    if full and not set(full) & set(chosen):
        chosen = sorted({*chosen[:-1], full[0] if first else full[-1]})
    return chosen
