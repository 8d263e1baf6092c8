"""How a stage's output came to be: versions, commit, command, inputs, time. Never a secret."""

import contextlib
import datetime
import functools
import hashlib
import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

from fastdraft_hf._atomic import sha256_file
from fastdraft_hf._errors import FastDraftError, change_texts
from fastdraft_hf.hub.folder import read_record

_BLOCK = 1 << 20

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


def weights(folder: Path) -> dict[str, str]:
    """Return the sha256 of every weight file that a stage made, by its path in ``folder``."""
    files = [f for ending in ("safetensors", "bin", "gguf") for f in folder.rglob(f"*.{ending}")]
    return {str(file.relative_to(folder)): _sha256(file, _BLOCK) for file in sorted(files)}


def check_weights(folder: Path) -> None:
    """Raise `FastDraftError` if a finished stage's weights are not those that it made."""
    found = weights(folder)
    for name, sha256 in read_record(folder).get("weights", {}).items():
        if found.get(name) != sha256:
            raise FastDraftError(
                f"{folder / name} is damaged, replaced or missing: its sha256 is not the one in "
                f"provenance.json; restore it, or delete {folder} to make it again"
            )


def target_weights(target: str) -> str | None:
    """Return a digest of a local target's weights: their names, sizes and content.

    Of files above 1 GiB, 64 KiB of every MiB count: another training is seen, one flipped bit may
    not be. ``None`` for the Hub, whose commit is recorded, and for the embedded target.
    """
    digest = hashlib.sha256()
    for file in sorted(Path(target).expanduser().glob("*.safetensors")):
        size = file.stat().st_size
        part = _BLOCK if size <= 1 << 30 else 1 << 16
        digest.update(f"{file.name} {size} {_sha256(file, part)}\n".encode())
    return digest.hexdigest()[:16] if Path(target).expanduser().is_dir() else None


def _sha256(file: Path, part: int) -> str:
    stat = file.stat()
    return _sha256_cached(file, part, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)


@functools.cache
def _sha256_cached(file: Path, part: int, size: int, *times: int) -> str:
    return sha256_file(file, part)
