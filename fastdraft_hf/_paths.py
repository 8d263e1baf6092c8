"""Where the package keeps what can be made again: one cache folder per user."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir(*parts: str) -> Path:
    """Return a folder under the user's cache (created if missing).

    ``FASTDRAFT_CACHE`` wins, then ``XDG_CACHE_HOME/fastdraft_hf``, then ``~/.cache/fastdraft_hf``.
    """
    root = os.environ.get("FASTDRAFT_CACHE")
    if root is None:
        base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
        root = os.path.join(base, "fastdraft_hf")
    path = Path(root).expanduser().joinpath(*parts)
    path.mkdir(parents=True, exist_ok=True)
    return path
