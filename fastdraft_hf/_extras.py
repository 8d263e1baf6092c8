"""Which optional parts are installed."""

from __future__ import annotations

import importlib.util


def openvino_available() -> bool:
    """Return whether the ``openvino`` extra is installed."""
    names = ("openvino", "openvino_genai", "openvino_tokenizers", "optimum.intel")
    try:
        return all(importlib.util.find_spec(name) for name in names)
    except ModuleNotFoundError:  # the parent package of optimum.intel
        return False
