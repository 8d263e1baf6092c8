"""Count the parameters of a config's model exactly, without allocating it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# Parts of a model by the names of its modules; the first match counts.
_PARTS = (
    ("embeddings", ("embed_tokens", "embed_in", "wte")),
    ("head", ("lm_head", "embed_out")),
    ("attention", ("attn", "attention.")),
    ("feed-forward", ("mlp", "feed_forward")),
)


class Shape(NamedTuple):
    """The widths of a draft: hidden size, key-value heads, feed-forward width."""

    width: int
    groups: int
    inner: int


def count_parameters(config: PretrainedConfig) -> int:
    """Return the exact number of parameters of ``config``'s model, built on the meta device.

    Tied weights count once.
    """
    return sum(parameters_by_part(config).values())


def parameters_by_part(config: PretrainedConfig) -> dict[str, int]:
    """Return the parameters of embeddings, attention, feed-forward, norms and head.

    A tied head counts 0. The other towers of a multimodal model count as ``other``.
    """
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    counts = dict.fromkeys(("embeddings", "attention", "feed-forward", "norms", "head"), 0)
    for name, parameter in model.named_parameters():
        if "vision" in name or "multi_modal" in name:
            part = "other"
        elif "norm" in name and "self_attn." not in name and "attention." not in name:
            part = "norms"
        else:
            part = next((p for p, words in _PARTS if any(w in name for w in words)), "other")
        counts[part] = counts.get(part, 0) + parameter.numel()
    return counts


def fitted_count(count: Callable[[Shape], int], shapes: Sequence[Shape]) -> Callable[[Shape], int]:
    """Return a function that predicts ``count`` from a few counts, exactly.

    Every part of a decoder is a matrix or a vector between two widths, so the count is linear in
    the widths and their products (and in the squares, where a width is also the sum of the heads).

    Args:
        count: the number of parameters of a shape; slow.
        shapes: what is asked for later, with any feed-forward; ascending in width.
    """
    import numpy as np

    def features(shape: Shape) -> np.ndarray:
        width, groups, inner = shape
        raw = [1, width, groups, inner, width * groups, width * inner, width * width]
        return np.array(raw, dtype=float)

    scale = features(shapes[-1])
    rows: list[np.ndarray] = []
    counts = []
    # Shapes with independent features determine the fit.
    for shape in [*shapes[:: max(1, len(shapes) // 16)], *shapes]:
        for one in (shape, shape._replace(inner=max(1, shape.inner // 2))):
            row = features(one) / scale
            if np.linalg.matrix_rank(np.array([*rows, row]), tol=1e-7) > len(rows):
                rows.append(row)
                counts.append(count(one))
        if len(rows) == len(scale):
            break
    weights = np.linalg.lstsq(np.array(rows), np.array(counts, dtype=float), rcond=None)[0]
    return lambda shape: round(float(features(shape) / scale @ weights))
