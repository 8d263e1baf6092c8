"""Scale a target's config down to a draft's: the same architecture within a parameter budget."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from fastdraft_hf._errors import FastDraftError
from fastdraft_hf.draft.config import DesignConfig
from fastdraft_hf.draft.cutting import kept_layers
from fastdraft_hf.draft.families import (
    FAMILIES,
    dense_config,
    family_of,
    head_groups,
    head_size,
    text_config,
)
from fastdraft_hf.draft.sizes import Shape, count_parameters, fitted_count
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


def design_draft(target_config: PretrainedConfig, design: DesignConfig) -> PretrainedConfig:
    """Return the config of a draft for ``target_config``, which is not changed.

    Vocabulary, tied or untied head, rope settings, head size, grouped-query ratio, activation,
    norms, multipliers and special tokens are the target's; depth and widths are scaled. A mixture
    of experts gets a dense relative, a multimodal model a draft of its text part. Without
    ``hidden_size``, width and feed-forward meet ``params`` to within 2%: among the widths that can,
    the one whose feed-forward is closest to the target's proportion (with `prune`, closest to the
    target's own feed-forward width, which is never exceeded).

    Args:
        target_config: the target's config, as `AutoConfig` reads it.
        design: the section. With a ``donor``, the donor's architecture is scaled instead, with the
            target's vocabulary.

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

    It is a copy at full size, of a dense family and of the text part only. What belongs to the
    target's files (their name, quantization, code) is left out.

    Raises:
        FastDraftError: no draft can be designed for the family.
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
    layers = source.num_hidden_layers
    if design.num_hidden_layers > layers:
        raise FastDraftError(
            f"design.num_hidden_layers: {design.num_hidden_layers} is deeper than the target's "
            f"{layers}"
        )
    if isinstance(design.layers, list) and design.layers[-1] >= layers:
        raise FastDraftError(
            f"design.layers: there is no layer {design.layers[-1]}; the last of {layers} is "
            f"{layers - 1}"
        )
    if design.hidden_size is not None and design.hidden_size > source.hidden_size:
        raise FastDraftError(
            f"design.hidden_size: {design.hidden_size} is wider than the target's "
            f"{source.hidden_size}"
        )
    wanted = design.intermediate_size
    if design.takes_layers and wanted and wanted > source.intermediate_size:
        raise FastDraftError(
            f"design.intermediate_size: {wanted} is wider than the target's "
            f"{source.intermediate_size}, which it would be cut from"
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
        rotary = _rotary_share(source)
        sizes = {g: width // (g * ratio) for g in fitting}
        fitting = [
            g
            for g, s in sizes.items()
            if s == size
            or (
                not design.takes_layers
                and s % 2 == 0
                and int(s * rotary) % 2 == 0
                and size / 2 <= s <= size * 2
                and int(s * rotary) > 0
            )
        ]
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


def _rotary_share(source: Any) -> float:
    rope = getattr(source, "rope_parameters", None) or {}
    return float(rope.get("partial_rotary_factor", getattr(source, "partial_rotary_factor", 1.0)))


class _Candidate(NamedTuple):
    shape: Shape
    size: int
    stretch: float  # |log| of the feed-forward over its natural width


def _fitted(source: Any, design: DesignConfig) -> Shape:
    """Return the shape closest to the budget."""
    count = functools.cache(lambda shape: count_parameters(_scaled(source, design, shape)))
    narrowest, best = LEAST_WIDTH, list[_Candidate]()
    for step in WIDTH_STEPS:
        widths = range(step, source.hidden_size + 1, step)
        natural = [_natural(source, design, width) for width in widths if width >= narrowest]
        shapes = [shape for shape in natural if shape is not None]
        if not shapes:
            continue
        size = fitted_count(count, shapes)
        found = [_filled(source, design, shape, size) for shape in shapes]
        fitting = [candidate for candidate in found if candidate is not None]
        if fitting:
            best = [min([*best, *fitting], key=lambda c: _badness(c, design))]
            narrowest = fitting[0].shape.width
            if not any(_badness(best[0], design)[:2]):
                break
    if best:
        return best[0].shape
    if not shapes:
        raise FastDraftError(
            f"design.hidden_size: no multiple of {step} from {LEAST_WIDTH} up to the target's "
            f"width of {source.hidden_size} can be divided among its heads; set it"
        )
    least = shapes[0]._replace(inner=_bounds(source, design, shapes[0])[0])
    raise FastDraftError(
        f"design.params: {design.params:,} cannot hold a vocabulary of {source.vocab_size:,} "
        f"tokens; the least, {least.width} wide, is {count(least):,}"
    )


def _badness(candidate: _Candidate, design: DesignConfig) -> tuple[Any, ...]:
    short = 1 - candidate.size / design.params
    far = short > TOLERANCE
    return (far, candidate.stretch > STRETCH, short if far else candidate.stretch, -candidate.size)


def _bounds(source: Any, design: DesignConfig, shape: Shape) -> tuple[int, int]:
    """Return the narrowest and the widest feed-forward to consider."""
    if design.intermediate_size:
        return shape.inner, shape.inner
    low = max(1, shape.inner // 4)
    return low, shape.inner if design.takes_layers else min(
        2 * shape.inner, source.intermediate_size
    )


def _filled(
    source: Any, design: DesignConfig, shape: Shape, size: Callable[[Shape], int]
) -> _Candidate | None:
    """Return ``shape`` with the feed-forward that fills the budget, or None if none fits."""
    low, high = _bounds(source, design, shape)
    base = size(shape._replace(inner=low))
    if base > design.params:
        return None
    slope = (size(shape._replace(inner=high)) - base) / (high - low) if high > low else 0.0
    most = high if not slope else min(high, low + int((design.params - base) / slope))
    natural = shape.inner
    if most >= natural and 1 - size(shape) / design.params <= TOLERANCE:
        most = natural
    for multiple in (32, 8, 1):  # round widths where they cost less than half a percent
        inner = most if most in (natural, low, high) else most // multiple * multiple
        if inner >= low and slope * (most - inner) <= design.params / 200:
            break
    filled = shape._replace(inner=inner)
    return _Candidate(filled, size(filled), abs(math.log(inner / natural)))


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
    """Set the depth of ``draft`` in place and cut its per-layer lists down to ``layers``.

    Args:
        draft: the config to change, which is returned.
        source: the config whose layers are counted.
        layers: indices of layers of ``source``.
    """
    total = source.num_hidden_layers
    draft.num_hidden_layers = len(layers)
    for name, value in source.to_dict().items():
        listed = isinstance(value, (list, tuple)) and len(value) == total and "layer" in name
        if listed and name != "layers":
            setattr(draft, name, [value[i] for i in layers])
    if isinstance(getattr(source, "max_window_layers", None), int):
        draft.max_window_layers = min(source.max_window_layers, len(layers))
    return draft
