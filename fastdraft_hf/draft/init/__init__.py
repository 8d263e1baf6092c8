"""A draft's weights before training: random, or with what another model knows put in.

A draft is mostly vocabulary, so what its embeddings know at the start decides how much a small
token budget gives. One file a kind: a `Method` under ``@register_method``, found by itself.
"""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from fastdraft_hf._errors import FastDraftError
from fastdraft_hf.draft.config import DesignConfig
from fastdraft_hf.draft.init.base import Method, Request

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

T = TypeVar("T", bound=type[Method])

_METHODS: dict[str, Method] = {}


def register_method(cls: T) -> T:
    """Make a `Method` known by its name."""
    _METHODS[cls.name] = cls()
    return cls


def methods() -> dict[str, Method]:
    """Return every kind of initialization by name."""
    return dict(_METHODS)


def init(
    target: Path, config: PretrainedConfig, design: DesignConfig, seed: int
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Build a draft in float32 with its initialization.

    Args:
        target: the target's folder; not read for ``scratch``.
        config: the draft's config, from `design_draft` with the same ``design``.
        design: which initialization, and from where.
        seed: of the random ones.

    Returns:
        the draft, and facts about how it was made.

    Raises:
        FastDraftError: the donor's vocabulary or family does not allow it.
    """
    if design.method not in _METHODS:
        raise FastDraftError(f"design.init: there is no '{design.method}'")
    request = Request(Path(target), config, design, seed)
    draft, facts = _METHODS[design.method].build(request)
    draft.config.dtype = "float32"
    return draft, {"init": design.init, **facts}


for _module in sorted(module.name for module in pkgutil.iter_modules(__path__)):
    importlib.import_module(f"{__name__}.{_module}")

__all__ = ["Method", "Request", "init", "methods", "register_method"]
