"""Scale a target's config down to a draft's: the same architecture within a parameter budget."""

from __future__ import annotations

import bisect
import copy
import functools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from fastdraft_hf._errors import FastDraftError
from fastdraft_hf.draft.config import DesignConfig
from fastdraft_hf.draft.cutting import kept_layers
from fastdraft_hf.draft.families import (
    FAMILIES,
    count_parameters,
    dense_config,
    family_of,
    head_groups,
    head_size,
    text_config,
)
from fastdraft_hf.target.resolve import load_config, resolve_target

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# How far below its budget a draft may stay, and how far its feed-forward may move from the
# target's proportion before finer widths are tried.
TOLERANCE = 0.02
STRETCH = math.log(2)

# Widths are multiples of the first, or of the next where the budget cannot be met otherwise. Heads
# in groups of three or seven allow few widths.
WIDTH_STEPS = (32, 16, 8)
LEAST_WIDTH = 32


class Shape(NamedTuple):
    """The widths of a draft: hidden size, key-value heads, feed-forward width."""

    width: int
    groups: int
    inner: int


def design_draft(target_config: PretrainedConfig, design: DesignConfig) -> PretrainedConfig:
    """Return the config of a draft for ``target_config``, which is not changed.

    Depth and widths are scaled, the rest is the target's, or a ``donor``'s with the target's
    vocabulary. A mixture of experts gets a dense relative, a multimodal model a draft of its text
    part. Without ``hidden_size``, width and feed-forward meet ``params`` to within 2%: among the
    widths that can, the one whose feed-forward is closest to the target's proportion (with `prune`,
    closest to the target's own feed-forward width, which is never exceeded).

    Raises:
        FastDraftError: the family is not supported, the budget cannot hold the vocabulary, or a
            given size does not fit the target.
    """
    source = source_config(target_config, design)
    _check(source, design)
    if design.hidden_size is not None:
        shape = _natural(source, design, design.hidden_size)
        if shape is None:
            raise FastDraftError(
                f"design.hidden_size: {design.hidden_size} is not a multiple of the attention "
                f"heads it would have; the target has {source.num_attention_heads} in "
                f"{head_groups(source)} groups"
            )
        return _scaled(source, design, shape)
    return _scaled(source, design, _fitted(source, design))


def source_config(target_config: PretrainedConfig, design: DesignConfig) -> PretrainedConfig:
    """Return the config to scale: the target's, or the donor's with the target's vocabulary.

    It is a copy of the text part, of a dense family, without what belongs to the target's files
    (their name, quantization, code).
    """
    target = text_config(target_config)
    family = family_of(target)
    if design.donor is None:
        if family.dense and design.takes_layers:
            raise FastDraftError(
                f"design.init: {design.init} cannot cut layers of family '{target.model_type}', a "
                "mixture of experts; use project or scratch, or a dense donor"
            )
        source = copy.deepcopy(dense_config(target))
    else:
        folder = resolve_target(design.donor, weights=False, key="design.donor").path
        donor = text_config(load_config(folder, "design.donor"))
        if donor.model_type not in FAMILIES or family_of(donor).dense:
            raise FastDraftError(
                f"design.donor: layers of family '{donor.model_type}' cannot be cut; dense "
                f"families can: {', '.join(n for n, f in FAMILIES.items() if not f.dense)}"
            )
        source = copy.deepcopy(donor)
        source.vocab_size = target.vocab_size
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(source, name, getattr(target, name, None))
    # Converters leave names of files in keys of their own, such as `_model_name_or_path`.
    private = [name for name in vars(source) if name.endswith("name_or_path")]
    for name in ("quantization_config", "_pre_quantization_dtype", "auto_map", *private):
        source.__dict__.pop(name, None)
    source.name_or_path = ""
    # Targets are often saved from training, where the cache is off.
    source.use_cache = True
    return source


def _check(source: Any, design: DesignConfig) -> None:
    limits = {"num_hidden_layers": source.num_hidden_layers, "hidden_size": source.hidden_size}
    if design.takes_layers:
        limits["intermediate_size"] = source.intermediate_size
    for name, limit in limits.items():
        value = getattr(design, name)
        if value is not None and value > limit:
            raise FastDraftError(f"design.{name}: {value} is more than the target's {limit}")
    layers = source.num_hidden_layers
    if isinstance(design.layers, list) and design.layers[-1] >= layers:
        raise FastDraftError(
            f"design.layers: there is no layer {design.layers[-1]}; the last of {layers} is "
            f"{layers - 1}"
        )


def _natural(source: Any, design: DesignConfig, width: int) -> Shape | None:
    """Return the shape of a draft of ``width`` in the target's proportions, or None if none fits.

    The head size stays, because rope's frequencies belong to it. The number of heads shrinks with
    the width, in whole groups of the target's grouped-query ratio. The number of heads divides the
    width: many configs and engines require it, whatever the size of a head.
    """
    groups, size = head_groups(source), head_size(source)
    ratio = source.num_attention_heads // groups
    fitting = [g for g in range(1, groups + 1) if width % (g * ratio) == 0]
    ideal = groups * width / source.hidden_size
    if not family_of(source).own_head_size:
        # Here the head size is width / heads, so it can stay only at some widths. Cut layers need
        # it unchanged; others take the nearest size that rope can halve.
        rope = getattr(source, "rope_parameters", None) or {}
        rotary = rope.get("partial_rotary_factor", getattr(source, "partial_rotary_factor", 1.0))

        def fits(new: int) -> bool:
            halves = new % 2 == 0 and int(new * rotary) % 2 == 0 < int(new * rotary)
            return new == size or (
                not design.takes_layers and halves and size / 2 <= new <= size * 2
            )

        fitting = [g for g in fitting if fits(width // (g * ratio))]
        ideal = width / (size * ratio)
    if not fitting:
        return None
    if design.takes_layers:  # a cut layer keeps as much of its inner widths as possible
        chosen, inner = max(fitting), source.intermediate_size
    else:
        chosen = min(fitting, key=lambda g: (abs(math.log(g / ideal)), g))
        proportion = width * source.intermediate_size / source.hidden_size
        inner = min(max(32, round(proportion / 32) * 32), source.intermediate_size)
    return Shape(width, chosen, design.intermediate_size or inner)


class _Candidate(NamedTuple):
    shape: Shape
    size: int
    stretch: float  # |log| of the feed-forward over its natural width


def _fitted(source: Any, design: DesignConfig) -> Shape:
    """Return the shape closest to the budget."""

    @functools.cache
    def count(shape: Shape) -> int:
        return count_parameters(_scaled(source, design, shape))

    def least(shape: Shape) -> Shape:
        """Return ``shape`` with the narrowest feed-forward to consider."""
        return shape if design.intermediate_size else shape._replace(inner=max(1, shape.inner // 4))

    def filled(shape: Shape) -> _Candidate:
        """Return ``shape`` with the feed-forward that fills the budget; sizes are linear in it."""
        natural, narrow = shape.inner, least(shape)
        low = high = narrow.inner
        if not design.intermediate_size:
            high = natural if design.takes_layers else min(2 * natural, source.intermediate_size)
        size, slope, most = count(narrow), 0, high
        if high > low:
            slope = (count(shape._replace(inner=high)) - size) // (high - low)
            most = min(high, low + (design.params - size) // slope)
        if most >= natural and short(size + slope * (natural - low)) <= TOLERANCE:
            most = natural
        for multiple in (32, 8, 1):  # round widths where they cost less than half a percent
            inner = most if most in (natural, low, high) else most // multiple * multiple
            if inner >= low and slope * (most - inner) <= design.params / 200:
                break
        stretch = abs(math.log(inner / natural))
        return _Candidate(shape._replace(inner=inner), size + slope * (inner - low), stretch)

    def short(size: int) -> float:
        return 1 - size / design.params

    def badness(candidate: _Candidate) -> tuple[Any, ...]:
        missing, stretch = short(candidate.size), candidate.stretch
        far = missing > TOLERANCE
        return far, stretch > STRETCH, missing if far else stretch, -candidate.size

    widths = range(LEAST_WIDTH, source.hidden_size + 1, WIDTH_STEPS[-1])
    shapes = [shape for width in widths if (shape := _natural(source, design, width)) is not None]
    if not shapes:
        raise FastDraftError(
            f"design.hidden_size: no multiple of {WIDTH_STEPS[-1]} from {LEAST_WIDTH} up to the "
            f"target's width of {source.hidden_size} can be divided among its heads; set it"
        )
    if (size := count(least(shapes[0]))) > design.params:
        raise FastDraftError(
            f"design.params: {design.params:,} cannot hold a vocabulary of {source.vocab_size:,} "
            f"tokens; the least, {shapes[0].width} wide, is {size:,}"
        )
    found: list[_Candidate] = []
    for step in WIDTH_STEPS:
        wide = [shape for shape in shapes if shape.width % step == 0]
        fitting = bisect.bisect_right(wide, design.params, key=lambda shape: count(least(shape)))
        for shape in reversed(wide[:fitting]):
            found.append(filled(shape))
            if short(found[-1].size) > 0.5:
                break  # narrower ones are smaller still
        if found and not any(badness(min(found, key=badness))[:2]):
            break
    return min(found, key=badness).shape


def _scaled(source: Any, design: DesignConfig, shape: Shape) -> PretrainedConfig:
    """Return ``source`` with the depth of ``design`` and the widths of ``shape``."""
    draft = copy.deepcopy(source)
    groups = head_groups(source)
    heads = shape.groups * (source.num_attention_heads // groups)
    draft.hidden_size = shape.width
    draft.num_attention_heads = heads
    if hasattr(source, "num_key_value_heads"):
        draft.num_key_value_heads = shape.groups
    if family_of(source).own_head_size:
        draft.head_dim = head_size(source)
    draft.intermediate_size = shape.inner
    kept = design.layers if isinstance(design.layers, list) else None
    return with_layers(draft, source, kept or kept_layers(source, design.num_hidden_layers))


def with_layers(draft: Any, source: Any, layers: Sequence[int]) -> PretrainedConfig:
    """Return ``draft`` with these layers of ``source``: its depth and per-layer lists, in place."""
    total = source.num_hidden_layers
    draft.num_hidden_layers = len(layers)
    for name, value in source.to_dict().items():
        listed = isinstance(value, (list, tuple)) and len(value) == total and "layer" in name
        if listed and name != "layers":
            setattr(draft, name, [value[i] for i in layers])
    if isinstance(getattr(source, "max_window_layers", None), int):
        draft.max_window_layers = min(source.max_window_layers, len(layers))
    return draft
