"""The objective of training: a weighted sum of named terms. One file a term.

A new loss is one module in this folder with a `Term` under ``@register_term``; it is found by
itself. A term of somebody's own package registers itself when that package is imported.
"""

from __future__ import annotations

import importlib
import math
import pkgutil
from collections.abc import Mapping
from typing import TypeVar

from fastdraft_hf._errors import nearest
from fastdraft_hf.train.objectives.base import Pair, Term

T = TypeVar("T", bound=type[Term])

_TERMS: dict[str, Term] = {}

# The combinations the paper compares for alignment (arXiv 2411.11055, section 4.4), by name.
PRESETS: dict[str, dict[str, float]] = {
    "ce": {"ce": 1.0},
    "ce_kl": {"ce": 0.5, "kl": 0.5},
    "ce_tvd": {"ce": 0.5, "tvd": 0.5},
    "kl": {"kl": 1.0},
    "tvd": {"tvd": 1.0},
}


def register_term(cls: T) -> T:
    """Make a `Term` known by its name.

    Raises:
        ValueError: another term has the name.
    """
    known = type(_TERMS.get(cls.name, cls()))
    # The same class again is its module reloaded.
    if (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
        raise ValueError(f"a term named '{cls.name}' is registered already")
    _TERMS[cls.name] = cls()
    return cls


def terms() -> dict[str, Term]:
    """Return every registered term by name."""
    return dict(_TERMS)


class Objective:
    """A weighted sum of terms.

    Args:
        weights: weight by name of term (``{"ce": 0.5, "kl": 0.5}``), or the name of a term or a
            preset. Weights are used as they are; they need not sum to one.

    Raises:
        ValueError: an unknown name, or a weight that is no number above 0.
    """

    def __init__(self, weights: Mapping[str, float] | str) -> None:
        if isinstance(weights, str):
            known = {**{name: {name: 1.0} for name in _TERMS}, **PRESETS}
            if weights not in known:
                raise ValueError(
                    f"objective: there is no '{weights}'{nearest(weights, known)}; terms: "
                    f"{', '.join(_TERMS)}; presets: {', '.join(PRESETS)}"
                )
            weights = known[weights]
        if not weights:
            raise ValueError(f"objective: at least one term is needed, of {', '.join(_TERMS)}")
        for name, weight in weights.items():
            if name not in _TERMS:
                raise ValueError(
                    f"objective.{name}: there is no such term{nearest(name, _TERMS)}; terms: "
                    f"{', '.join(_TERMS)}"
                )
            number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
            if not number or not math.isfinite(weight) or weight <= 0:
                raise ValueError(f"objective.{name}: a weight above 0 is needed, got {weight!r}")
        self.weights = {name: float(weight) for name, weight in weights.items()}

    @property
    def needs_distribution(self) -> bool:
        """Whether labels alone are not enough."""
        return bool(self.divergences)

    @property
    def label_weight(self) -> float:
        """The weight of cross-entropy on the labels."""
        return self.weights.get("ce", 0.0)

    @property
    def divergences(self) -> dict[str, tuple[float, Term]]:
        """Weight and term of everything that compares two distributions."""
        return {
            name: (weight, _TERMS[name]) for name, weight in self.weights.items() if name != "ce"
        }

    def __repr__(self) -> str:
        return " + ".join(f"{weight:g} {name}" for name, weight in self.weights.items())


for _module in sorted(module.name for module in pkgutil.iter_modules(__path__)):
    importlib.import_module(f"{__name__}.{_module}")

__all__ = ["PRESETS", "Objective", "Pair", "Term", "register_term", "terms"]
