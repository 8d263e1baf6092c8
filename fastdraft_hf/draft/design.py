"""Scale a target's config down to a draft's: the same architecture within a parameter budget."""

import copy
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from transformers import PretrainedConfig

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
    read_parameters,
    text_config,
)
from fastdraft_hf.target.resolve import load_config, resolve_target

# How far from its budget a draft may be.
TOLERANCE = 0.02
# How much more a draft of the default budget may read with the widest feed-forward.
INNER_TOLERANCE = 0.05
# A draft has 2 layers, and 4 if those read hardly more, as with a vocabulary that takes nearly all
# of it: in OpenVINO its pass takes no longer then, and it is right more often (docs/design.md).
LAYERS, MORE_LAYERS, DEPTH_TOLERANCE = 2, 4, 0.06

# Bounds of a designed shape, as multiples of the width: what hardware and training like, whatever
# the target's heads and feed-forward are. The target's own proportions are between them.
MOST_ATTENTION = 2
LEAST_INNER, MOST_INNER = 2, 6

# The default budget of a target that reads N parameters per token: 13.5M · (N / 135M)^0.6. It is a
# tenth of a 135M target, a fiftieth of an 8B one, which can afford a lower share: our measured
# draft of SmolLM2-135M and the paper's of Phi-3-mini and Llama-3.1-8B are near it.
DEFAULT_SHARE, DEFAULT_REFERENCE, DEFAULT_POWER = 0.1, 135e6, 0.6


class Shape(NamedTuple):
    """The widths of a draft: hidden size, key-value heads, query heads of each, feed-forward."""

    width: int
    groups: int
    ratio: int
    inner: int


def resolve_design(target_config: PretrainedConfig, design: DesignConfig) -> DesignConfig:
    """Return ``design`` with what it leaves to the target: the initialization.

    ``auto`` is `prune`, and `project` for a family whose layers cannot be cut.
    """
    if design.init != "auto":
        return design
    relative = family_of(text_config(target_config)).dense and design.donor is None
    return design.model_copy(update={"init": "project" if relative else "prune"})


def default_budget(target_config: PretrainedConfig) -> int:
    """Return how many parameters a draft should read per token.

    That is what its speed depends on: the input embeddings are looked up and not read, unless the
    head shares them. A family with a dense relative counts as that.
    """
    read = read_parameters(dense_config(text_config(target_config)))
    share = DEFAULT_SHARE * DEFAULT_REFERENCE * (read / DEFAULT_REFERENCE) ** DEFAULT_POWER
    return int(share)


def design_draft(target_config: PretrainedConfig, design: DesignConfig) -> PretrainedConfig:
    """Return the config of a draft for ``target_config``, which is not changed.

    Depth and widths are scaled, the rest is the target's, or a ``donor``'s with the target's
    vocabulary. A family whose layers cannot be cut gets a dense relative, a multimodal model a
    draft of its text part. Without ``hidden_size``, the widths meet ``params``, or without it the
    `default_budget`, as closely as the bounds of a shape allow: a width that is a multiple of 64
    (for a target narrower than 512, of an eighth of its width), attention at most twice as wide,
    and a feed-forward of 2 to 6 times the width. Among the widths that meet the budget to within
    2%, the one whose feed-forward is closest to the target's proportion is chosen, or with cut
    layers the one that keeps most of it.

    Raises:
        FastDraftError: the family is not supported, the budget cannot hold the vocabulary, or a
            given size does not fit the target.
    """
    design = resolve_design(target_config, design)
    if design.num_hidden_layers is None:
        return _of_own_depth(target_config, design)
    source = source_config(target_config, design)
    _check(source, design)
    if design.hidden_size is not None:
        shape = _natural(source, design, design.hidden_size)
        if shape is None:
            raise FastDraftError(
                f"design.hidden_size: {design.hidden_size} cannot be divided among attention heads "
                f"of size {head_size(source)}; use a multiple of {_step(source)}"
            )
        return _scaled(source, design, shape)
    if design.params is None:
        shape = _fitted(source, design, default_budget(target_config), read_parameters)
        # Where the vocabulary takes nearly all of it, the layers would be left with the least.
        wide = shape._replace(inner=_inner_bounds(source, design, shape.width)[1])
        size, larger = (read_parameters(_scaled(source, design, one)) for one in (shape, wide))
        if larger <= (1 + INNER_TOLERANCE) * size:
            shape = wide
    else:
        shape = _fitted(source, design, design.params, count_parameters)
    return _scaled(source, design, shape)


def _of_own_depth(target_config: PretrainedConfig, design: DesignConfig) -> PretrainedConfig:
    """Return the config of a draft whose depth is left to the target, or to ``layers``."""
    if isinstance(design.layers, list):
        update = {"num_hidden_layers": len(design.layers)}
        return design_draft(target_config, design.model_copy(update=update))
    draft = design_draft(target_config, design.model_copy(update={"num_hidden_layers": LAYERS}))
    most = source_config(target_config, design).num_hidden_layers
    if design.params is not None or design.hidden_size is not None or most < MORE_LAYERS:
        return draft
    sizes = {name: getattr(draft, name) for name in ("hidden_size", "intermediate_size")}
    update = {"num_hidden_layers": MORE_LAYERS, **sizes}
    deep = design_draft(target_config, design.model_copy(update=update))
    cheap = read_parameters(deep) <= (1 + DEPTH_TOLERANCE) * read_parameters(draft)
    return deep if cheap else draft


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
                f"design.init: {design.init} cannot cut layers of family '{target.model_type}', "
                f"whose drafts are {family.dense}; use project or scratch, or a dense donor"
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


def _step(source: Any) -> int:
    """Return what the width is a multiple of: 64, or for a small target a power of two below."""
    return min(64, 1 << int(math.log2(max(source.hidden_size // 8, 8))))


def _inner_bounds(source: Any, design: DesignConfig, width: int) -> list[int]:
    if design.intermediate_size:
        return [design.intermediate_size] * 2
    return [min(n * width, source.intermediate_size) for n in (LEAST_INNER, MOST_INNER)]


def _natural(source: Any, design: DesignConfig, width: int) -> Shape | None:
    """Return the shape of a draft of ``width`` in the target's proportions, or None if none fits.

    The head size stays, because rope's frequencies belong to it. The number of heads divides the
    width: many configs and engines require it, whatever the size of a head. A group of query heads
    may lose some of them, so that a target with seven heads in a group has narrow drafts too.
    """
    groups, size = head_groups(source), head_size(source)
    ratio = source.num_attention_heads // groups
    pairs = itertools.product(range(1, groups + 1), range(1, ratio + 1))
    fitting = [(g, r) for g, r in pairs if width % (g * r) == 0]
    if family_of(source).own_head_size:
        ideal = source.num_attention_heads * width / source.hidden_size
        fitting = [(g, r) for g, r in fitting if g * r * size <= max(MOST_ATTENTION * width, size)]
    else:
        # Here the head size is width / heads, so it can stay only at some widths. Cut layers need
        # it unchanged; others take the nearest size that rope can halve.
        rope = getattr(source, "rope_parameters", None) or {}
        rotary = rope.get("partial_rotary_factor", getattr(source, "partial_rotary_factor", 1.0))

        def fits(new: int) -> bool:
            halves = new % 2 == 0 and int(new * rotary) % 2 == 0 < int(new * rotary)
            return new == size or (
                not design.takes_layers and halves and size / 2 <= new <= size * 2
            )

        fitting = [(g, r) for g, r in fitting if fits(width // (g * r))]
        ideal = width / size
    if not fitting:
        return None
    bounds = _inner_bounds(source, design, width)
    if design.takes_layers:  # a cut layer keeps as much of its inner widths as possible
        chosen, inner = max(fitting, key=lambda pair: (pair[0] * pair[1], pair[1])), bounds[1]
    else:
        chosen = min(fitting, key=lambda pair: (abs(math.log(math.prod(pair) / ideal)), -pair[1]))
        proportion = width * source.intermediate_size / source.hidden_size
        inner = sorted((*bounds, round(proportion / _step(source)) * _step(source)))[1]
    return Shape(width, *chosen, inner)


class _Candidate(NamedTuple):
    shape: Shape
    missing: float  # share of the budget that is not used
    stretch: float  # |log| of the feed-forward over its natural width


def _fitted(
    source: Any, design: DesignConfig, budget: int, count: Callable[[PretrainedConfig], int]
) -> Shape:
    """Return the shape closest to a budget of those parameters that ``count`` counts."""
    step = _step(source)

    def size_of(shape: Shape) -> int:
        return count(_scaled(source, design, shape))

    def filled(shape: Shape) -> _Candidate:
        """Return ``shape`` with the feed-forward that fills the budget; sizes are linear in it."""
        low, high = _inner_bounds(source, design, shape.width)
        least, most = (size_of(shape._replace(inner=inner)) for inner in (low, high))
        slope = (most - least) / max(high - low, 1)
        inner = high
        if most > budget and high > low:
            inner = max(low, int(low + (budget - least) / slope) // step * step)
        natural = shape.inner
        if inner > natural and 1 - (least + slope * (natural - low)) / budget <= TOLERANCE:
            inner = natural
        missing = 1 - (least + slope * (inner - low)) / budget
        return _Candidate(shape._replace(inner=inner), missing, abs(math.log(inner / natural)))

    widths = sorted({*range(step, source.hidden_size + 1, step), source.hidden_size})
    widths = [width for width in widths if MOST_ATTENTION * width >= head_size(source)]
    shapes = [shape for width in widths if (shape := _natural(source, design, width)) is not None]
    if not shapes:
        raise FastDraftError(
            f"design.hidden_size: no multiple of {step} up to the target's width of "
            f"{source.hidden_size} can be divided among its heads; set it"
        )
    found: list[_Candidate] = []
    for shape in shapes:
        found.append(filled(shape))
        if found[-1].missing < -TOLERANCE:
            break  # wider ones are larger still
    fitting = [candidate for candidate in found if candidate.missing >= -TOLERANCE]
    if not fitting:
        if design.params is None:
            return found[0].shape  # the least draft of a small target with a large vocabulary
        least = size_of(found[0].shape)
        raise FastDraftError(
            f"design.params: {budget:,} cannot hold a vocabulary of {source.vocab_size:,} tokens; "
            f"the least, {shapes[0].width} wide, is {least:,}"
        )
    # Those that meet the budget by their proportions, else the closest.
    return min(fitting, key=lambda c: (max(c.missing, TOLERANCE), c.stretch, c.missing)).shape


def _scaled(source: Any, design: DesignConfig, shape: Shape) -> PretrainedConfig:
    """Return ``source`` with the depth of ``design`` and the widths of ``shape``."""
    draft = copy.deepcopy(source)
    draft.hidden_size = shape.width
    draft.num_attention_heads = shape.groups * shape.ratio
    if hasattr(source, "num_key_value_heads"):
        draft.num_key_value_heads = shape.groups
    if family_of(source).own_head_size:
        draft.head_dim = head_size(source)
    draft.intermediate_size = shape.inner
    kept = design.layers if isinstance(design.layers, list) else None
    depth = design.num_hidden_layers or LAYERS
    return with_layers(draft, source, kept or kept_layers(source, depth))


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
