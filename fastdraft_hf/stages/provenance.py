"""How a stage's output came to be: versions, commit, command, inputs, time. Never a secret."""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

from fastdraft_hf._errors import change_texts

# fmt: off
_PACKAGES = (
    "fastdraft_hf", "torch", "transformers", "trl", "accelerate", "datasets", "tokenizers",
    "huggingface-hub", "optimum-intel", "openvino", "openvino-genai", "nncf", "numpy",
)
# fmt: on


def versions() -> dict[str, str]:
    """Return the installed versions of what a result depends on."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def git_commit() -> str | None:
    """Return the commit of this package's checkout, with ``+`` when it is edited."""
    here = str(Path(__file__).resolve().parent)

    def git(*words: str) -> str:
        command = ["git", "-C", here, *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def machine() -> dict[str, Any]:
    """Return what this machine is, without its name or address."""
    import torch

    facts: dict[str, Any] = {
        "system": platform.system(),
        "architecture": platform.machine(),
        "cpu": _cpu_name(),
        "cpu_count": os.cpu_count(),
    }
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
        facts["gpu_count"] = torch.cuda.device_count()
    return facts


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"


def peak_memory_bytes() -> int:
    """Return the peak resident memory of this process or of a child it ran, in bytes."""
    try:
        import resource
    except ImportError:  # not on Windows
        return 0
    peak = max(
        resource.getrusage(who).ru_maxrss
        for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    return int(peak if sys.platform == "darwin" else peak * 1024)


def describe(**facts: Any) -> dict[str, Any]:
    """Return a provenance record: when, by what, on what, and the given facts."""
    record = {
        "finished": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join(sys.argv),
        "git_commit": git_commit(),
        "versions": versions(),
        "machine": machine(),
        "peak_memory_bytes": peak_memory_bytes(),
        **facts,
    }
    return dict(change_texts(record))
