"""Choose layers of a model and cut them to the widths of a draft of the same family.

Hidden states are carried over in one of three ways: all channels, the principal directions of the
vocabulary (`Basis`), or a choice of channels. The first whole groups of attention heads are kept,
and the feed-forward channels with the largest weights.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastdraft_hf.draft.basis import (
    Basis,
    decoder_of,
    final_norm,
    gain_of,
    project_vocabulary,
    set_gain,
    tied,
    vocabulary_basis,
)
from fastdraft_hf.draft.families import FAMILIES, head_groups, head_size

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# The rows of a projection that reads hidden states, or the columns of one that writes them: query
# heads, key-value heads, heads with query, key and value side by side, feed-forward channels.
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
    """How hidden states are carried over: by ``basis``, or by ``channels`` (None: all)."""

    basis: Basis | None = None
    channels: torch.Tensor | None = None

    def read(self, weight: torch.Tensor, gain: torch.Tensor | None) -> torch.Tensor:
        """Return a weight [.., D] as [.., d], with the gain of the norm before it folded in."""
        if self.basis is not None:
            scaled = weight if gain is None else weight * (gain / self.basis.scale)
            return scaled @ self.basis.directions
        return weight if self.channels is None else weight[..., self.channels]

    def write(self, weight: torch.Tensor) -> torch.Tensor:
        """Return a weight [D, ..] as [d, ..]."""
        if self.basis is not None:
            scale = self.basis.scale if weight.dim() == 1 else self.basis.scale[:, None]
            return self.basis.directions.T @ (scale * weight)
        return weight if self.channels is None else weight[self.channels]


def cut_vocabulary(source: PreTrainedModel, draft: PreTrainedModel) -> Hidden:
    """Set the draft's embeddings, head and final norm from the source's; return the map used.

    At the source's own width everything is copied. A narrower draft gets the principal directions
    where the family allows it, else the channels with the largest weights in embeddings and head.
    """
    import torch

    wide, width = source.config.get_text_config().hidden_size, draft.config.hidden_size
    family = FAMILIES[draft.config.model_type]
    if width < wide and family.pre_norms is not None:
        basis = vocabulary_basis(source, width)
        project_vocabulary(source, draft, basis)
        return Hidden(basis=basis)
    channels = None if width == wide else _largest_channels(source, width)
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
        # A tied weight carries the factor to the head too, where the gain removes it.
        gain = hidden.read(gain_of(old, theirs.weight), None) / (factor if tied(draft) else 1.0)
        if set_gain(norm, gain) and getattr(old, "bias", None) is not None:
            norm.bias.copy_(hidden.read(old.bias.float(), None))
    return hidden


def _largest_channels(source: PreTrainedModel, width: int) -> torch.Tensor:
    head = source.get_output_embeddings().weight.float()
    embeddings = source.get_input_embeddings().weight.float()
    gain = gain_of(final_norm(source), head)
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
    kept = {
        "q": torch.arange(head_groups(new) * ratio * size),
        "kv": torch.arange(head_groups(new) * size),
        "q3": torch.arange(new.num_attention_heads * size * 3),
        "ff": _largest_feed_forward(theirs, new.intermediate_size, inner),
    }
    wide = {"q": groups * ratio * size, "kv": groups * size, "q3": 0, "ff": inner}

    def rows(roles: Sequence[str]) -> torch.Tensor:
        """Return the rows of a projection to keep; a fused one has parts one after another."""
        starts = itertools.accumulate((wide[role] for role in roles), initial=0)
        return torch.cat([kept[role] + start for role, start in zip(roles, starts)])  # noqa: B905

    norms: Sequence[str] = ()
    gains: list[torch.Tensor] = []
    if hidden.basis is not None:
        norms = FAMILIES[new.model_type].pre_norms or ()
        gains = [gain_of(getattr(theirs, name), hidden.basis.scale) for name in norms]
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
            if hidden.basis is not None:
                continue  # folded into the projections
            value = hidden.read(weight, None)
        else:  # norms of single heads, and parameters that depend on no width
            value = weight[: to.shape[0]]
        to.copy_(value)
    for name in norms:
        set_gain(getattr(ours, name), 1.0)


def _largest_feed_forward(layer: Any, size: int, inner: int) -> torch.Tensor:
    modules = {name.rpartition(".")[2]: module for name, module in layer.named_modules()}
    up = next(modules[name].weight for name in _FEED_FORWARD_UP if name in modules)
    down = next(modules[n].weight for n, role in _WRITES.items() if role == "ff" and n in modules)
    weight = down.float().norm(dim=0) * up.float()[-inner:].norm(dim=1)
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


# Text like that a draft will see: an explanation, a list, a story, code, and a dialogue.
TEXTS = (
    "Bread rises because yeast turns sugar into gas, and the dough is tough enough to hold it. "
    "Warm water wakes the yeast, and kneading makes the dough stretch instead of tear.",
    "To repair a flat tyre:\n1. Take the wheel off.\n2. Lift the tyre from the rim.\n3. Find the "
    "hole in the tube.\n4. Sand it, glue it and press the patch on.\n5. Put everything back.",
    "The lighthouse keeper counted the ships each evening. That night one more came than he had "
    "counted the day before, and no lamp burned on it.",
    "def mean(values):\n    total = 0.0\n    for value in values:\n        total += value\n"
    "    return total / len(values) if values else None\n\n\nclass Stack:\n"
    "    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n"
    "        self.items.append(item)\n",
    "Q: Which is heavier, a litre of oil or a litre of water?\nA: The water. Oil floats on it, so "
    "the same volume of oil weighs less, by about a tenth.",
)


def block_influence(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[float]:
    """Return 1 − cos(hidden states before, after) of each layer, averaged over tokens of `TEXTS`.

    The measure of ShortGPT (Men et al. 2024, arXiv 2403.03853): a layer near 0 changes little.
    """
    import torch

    decoder, states = decoder_of(model), list[torch.Tensor]()

    def keep(_: Any, args: Any, kwargs: Any) -> None:
        states.append((args[0] if args else kwargs["hidden_states"]).float())

    # A layer's output is the next one's input, and the last layer's is the final norm's.
    modules = [*decoder.layers, final_norm(model)]
    handles = [module.register_forward_pre_hook(keep, with_kwargs=True) for module in modules]
    sums, tokens = torch.zeros(len(decoder.layers)), 0
    with torch.inference_mode():
        for text in TEXTS:
            ids = tokenizer(text, return_tensors="pt").input_ids.to(model.device)
            decoder(input_ids=ids, use_cache=False)
            cosines = [torch.cosine_similarity(a, b, -1) for a, b in itertools.pairwise(states)]
            sums += torch.stack([(1 - cosine).sum().cpu() for cosine in cosines])
            tokens += ids.numel()
            states.clear()
    for handle in handles:
        handle.remove()
    return [total / tokens for total in sums.tolist()]
