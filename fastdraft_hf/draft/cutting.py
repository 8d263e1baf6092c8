"""Layers of one model cut to the widths of another of the same family.

Three ways to take the hidden states over: all of them, along principal directions (`Basis`), or a
choice of channels. Of the heads the first whole groups are kept, of the feed-forward the channels
with the largest weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastdraft_hf.draft.families import FAMILIES, head_groups, head_size
from fastdraft_hf.draft.parts import decoder_of, final_norm, gain_of, set_gain, tied
from fastdraft_hf.draft.vocabulary_basis import Basis, project_vocabulary, vocabulary_basis

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

# What a projection's rows are (of one that reads hidden states) or its columns (of one that writes
# them): query heads, key-value heads, whole heads with their three parts, feed-forward channels.
_READS = {
    "q_proj": ("q",),
    "k_proj": ("kv",),
    "v_proj": ("kv",),
    "qkv_proj": ("q", "kv", "kv"),
    "query_key_value": ("q3",),
    "gate_proj": ("ff",),
    "up_proj": ("ff",),
    "gate_up_proj": ("ff", "ff"),
    "fc1": ("ff",),
    "c_fc": ("ff",),
    "dense_h_to_4h": ("ff",),
}
_WRITES = {
    "o_proj": "q",
    "dense": "q",
    "down_proj": "ff",
    "fc2": "ff",
    "c_proj": "ff",
    "dense_4h_to_h": "ff",
}
_FEED_FORWARD_UP = ("up_proj", "fc1", "c_fc", "dense_h_to_4h", "gate_up_proj")


@dataclass(frozen=True)
class Hidden:
    """How hidden states are taken over: ``basis``, or ``channels`` (all of them: None)."""

    basis: Basis | None = None
    channels: torch.Tensor | None = None

    def read(self, weight: torch.Tensor, gain: torch.Tensor | None) -> torch.Tensor:
        """Return columns [.., D] as [.., d]; ``gain`` is of the norm before, folded in."""
        if self.basis is not None:
            scaled = weight if gain is None else weight * (gain / self.basis.scale)
            return scaled @ self.basis.directions
        return weight if self.channels is None else weight[..., self.channels]

    def write(self, weight: torch.Tensor) -> torch.Tensor:
        """Return rows [D, ..] as [d, ..]."""
        if self.basis is not None:
            scale = self.basis.scale if weight.dim() == 1 else self.basis.scale[:, None]
            return self.basis.directions.T @ (scale * weight)
        return weight if self.channels is None else weight[self.channels]


def cut_vocabulary(source: PreTrainedModel, draft: PreTrainedModel) -> Hidden:
    """Set the draft's embeddings, head and final norm from the source's; return how.

    The whole width is copied. A narrower one is taken along principal directions where the family
    allows it, else along the channels that embeddings and head weigh most.
    """
    import torch

    wide, width = source.config.get_text_config().hidden_size, draft.config.hidden_size
    family = FAMILIES[draft.config.model_type]
    if width < wide and family.pre_norms is not None:
        basis = vocabulary_basis(source, width)
        project_vocabulary(source, draft, basis)
        return Hidden(basis=basis)
    channels = None if width == wide else _weighty_channels(source, width)
    hidden = Hidden(channels=channels)
    factor = math.sqrt(wide / width) if family.scaled_embeddings else 1.0
    with torch.no_grad():
        ours = draft.get_output_embeddings()
        theirs = source.get_output_embeddings()
        ours.weight.copy_(hidden.read(theirs.weight.float(), None))
        if getattr(ours, "bias", None) is not None:
            ours.bias.copy_(theirs.bias)
        embeddings = hidden.read(source.get_input_embeddings().weight.float(), None)
        draft.get_input_embeddings().weight.copy_(factor * embeddings)
        norm, old = final_norm(draft), final_norm(source)
        # A tied table carries the factor to the head as well, where the gain takes it out.
        gain = hidden.read(gain_of(old, wide), None) / (factor if tied(draft) else 1.0)
        if set_gain(norm, gain) and getattr(old, "bias", None) is not None:
            norm.bias.copy_(hidden.read(old.bias.float(), None))
    return hidden


def _weighty_channels(source: PreTrainedModel, width: int) -> torch.Tensor:
    head = source.get_output_embeddings().weight.float()
    embeddings = source.get_input_embeddings().weight.float()
    gain = gain_of(final_norm(source), head.shape[1])
    weight = sum(t.square().sum(0) / t.square().sum() for t in (head * gain, embeddings))
    channels: torch.Tensor = weight.topk(width).indices.sort().values
    return channels


def cut_layers(
    source: PreTrainedModel, draft: PreTrainedModel, hidden: Hidden, layers: Sequence[int]
) -> None:
    """Set the draft's layers from ``layers`` of the source, cut to the draft's widths.

    With a basis, the gains of the norms go into the projections behind them.
    """
    import torch

    with torch.no_grad():
        for ours, index in zip(decoder_of(draft).layers, layers, strict=True):
            _cut_layer(source, draft, ours, decoder_of(source).layers[index], hidden)


def _cut_layer(source: Any, draft: Any, ours: Any, theirs: Any, hidden: Hidden) -> None:
    import torch

    old, new = source.config.get_text_config(), draft.config
    size, ratio = head_size(new), new.num_attention_heads // head_groups(new)
    groups, inner = head_groups(old), old.intermediate_size
    taken = {
        "q": torch.arange(head_groups(new) * ratio * size),
        "kv": torch.arange(head_groups(new) * size),
        "q3": torch.arange(new.num_attention_heads * size * 3),
        "ff": _weighty_feed_forward(theirs, new.intermediate_size, inner),
    }
    wide = {"q": groups * ratio * size, "kv": groups * size, "q3": 0, "ff": inner}
    gains = _gains(theirs, new, old.hidden_size) if hidden.basis is not None else {}
    parameters = dict(theirs.named_parameters())
    for name, to in ours.named_parameters():
        weight = parameters[name].float()
        module, _, leaf = name.rpartition(".")
        kind = module.rpartition(".")[2]
        if kind in _READS:
            rows = _rows(_READS[kind], taken, wide)
            value = weight[rows]
            if leaf == "weight":
                value = hidden.read(value, gains.get("mlp" if _is_feed_forward(kind) else "attn"))
        elif kind in _WRITES:
            value = hidden.write(weight)
            value = value[:, taken[_WRITES[kind]]] if leaf == "weight" else value
        elif "norm" in name and "attn." not in name and "attention." not in name:
            if hidden.basis is not None:
                continue  # folded into the projections
            value = hidden.read(weight, None)
        else:  # norms of heads, and what is of no width at all
            value = weight[: to.shape[0]]
        to.copy_(value)
    if hidden.basis is not None:
        for norm in FAMILIES[new.model_type].pre_norms or ():
            set_gain(getattr(ours, norm), 1.0)


def _gains(layer: Any, config: Any, width: int) -> dict[str, torch.Tensor]:
    attention, feed_forward = FAMILIES[config.model_type].pre_norms or ("", "")
    return {
        "attn": gain_of(getattr(layer, attention), width),
        "mlp": gain_of(getattr(layer, feed_forward), width),
    }


def _is_feed_forward(kind: str) -> bool:
    return "ff" in _READS[kind]


def _rows(roles: Sequence[str], taken: dict[str, Any], wide: dict[str, int]) -> torch.Tensor:
    """Return which rows of a projection are kept; a fused one has its parts one after another."""
    import torch

    parts, start = [], 0
    for role in roles:
        parts.append(taken[role] + start)
        start += wide[role]
    return torch.cat(parts)


def _weighty_feed_forward(layer: Any, size: int, inner: int) -> torch.Tensor:
    modules = {name.rpartition(".")[2]: module for name, module in layer.named_modules()}
    up = next(modules[name].weight for name in _FEED_FORWARD_UP if name in modules)
    down = next(modules[n].weight for n, role in _WRITES.items() if role == "ff" and n in modules)
    weight = down.float().norm(dim=0) * up.float()[-inner:].norm(dim=1)
    kept: torch.Tensor = weight.topk(size).indices.sort().values
    return kept
