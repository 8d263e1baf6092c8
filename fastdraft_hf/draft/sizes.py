"""Count the parameters of a config's model exactly, without allocating it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
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


class SizeModel:
    """The number of parameters as a function of the widths, fitted to a few counted examples.

    Every part of a decoder is a matrix or a vector between two widths, so the count is linear in
    the widths and their products (and in the squares, where a width is also the sum of the heads).
    A handful of counts determine it exactly.
    """

    def __init__(self, count: Callable[[Shape], int]) -> None:
        self._count = count
        self._known: dict[Shape, int] = {}

    def exact(self, shape: Shape) -> int:
        """Return the counted number for ``shape``."""
        if shape not in self._known:
            self._known[shape] = self._count(shape)
        return self._known[shape]

    def learn(self, shapes: Iterable[Shape]) -> None:
        """Count enough of ``shapes``, and of narrower feed-forwards, to predict the rest."""
        import numpy as np

        everything = list(shapes)
        widest = everything[-1]
        self._scale = np.array(self._features(Shape(*(max(1, n) for n in widest)), 1.0))
        # Shapes with independent features, chosen greedily, determine the fit.
        basis = np.zeros((0, len(self._scale)))
        for shape in (
            s._replace(inner=inner)
            for s in [*everything[:: max(1, len(everything) // 16)], *everything]
            for inner in (s.inner, max(1, s.inner // 2))
        ):
            row = np.array(self._features(shape, self._scale))
            rest = row - basis.T @ (basis @ row)
            rest -= basis.T @ (basis @ rest)
            if np.linalg.norm(rest) > 1e-7 * np.linalg.norm(row):
                basis = np.vstack([basis, rest / np.linalg.norm(rest)])
                self.exact(shape)
            if len(basis) == len(self._scale):
                break
        known = list(self._known)
        rows = np.array([self._features(shape, self._scale) for shape in known])
        counts = np.array([self._known[shape] for shape in known], dtype=float)
        self._weights = np.linalg.lstsq(rows, counts, rcond=None)[0]

    def of(self, shape: Shape) -> int:
        """Return the predicted number for ``shape``, after `learn`."""
        import numpy as np

        if shape in self._known:
            return self._known[shape]
        return round(float(np.dot(self._features(shape, self._scale), self._weights)))

    @staticmethod
    def _features(shape: Shape, scale: object) -> list[float]:
        import numpy as np

        width, groups, inner = shape
        raw = [1, width, groups, inner, width * groups, width * inner, width * width]
        return list(np.array(raw, dtype=float) / scale)
