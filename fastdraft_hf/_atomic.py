"""Files and folders that appear whole or not at all, whatever kills the process."""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastdraft_hf._errors import FastDraftError

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# Rust's, shutil's and torch's errors have no errno; torch's do not even say what happened.
_NO_ROOM_TEXTS = (
    *(os.strerror(number) for number in _NO_ROOM),
    "failed writing file",
    "unexpected pos ",
    "iostream error",
)


@contextlib.contextmanager
def room_to_write(folder: Path) -> Iterator[None]:
    """Turn any library's error of a full disk into an `OSError` that names a file or ``folder``."""
    try:
        yield
    except FastDraftError:
        raise
    except Exception as error:
        full = getattr(error, "errno", None) in _NO_ROOM
        if not full and not any(text in str(error) for text in _NO_ROOM_TEXTS):
            raise
        reason = "no space left to write; make room and run the same command again"
        path = getattr(error, "filename", None) or folder
        raise OSError(errno.ENOSPC, reason, str(path)) from error


def fsync_path(path: Path) -> None:
    """Flush one file or folder to disk, so that a rename after it cannot outrun its content."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; rename it into place when the block ends well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        fsync_path(temporary)
        # mkstemp makes files private; a result is as readable as the folder it stands in.
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Return the content of a JSON file, or raise `FastDraftError` with its name."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise FastDraftError(f"{path} is damaged: not valid JSON ({error})") from None


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside ``path``; rename it into place when the block ends well.

    ``path`` must not exist: a folder that exists is finished (DESIGN: one stage, one folder).
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    try:
        yield temporary
        os.chmod(temporary, 0o755)
        publish_folder(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def publish_folder(temporary: Path, path: Path) -> None:
    """Flush a finished folder and rename it to ``path``.

    Temporary files that a killed run left in it are removed first.
    """
    for left in [*temporary.rglob(".*.tmp")]:
        if left.is_dir():
            shutil.rmtree(left)
        else:
            left.unlink(missing_ok=True)
    for file in temporary.rglob("*"):
        if file.is_file():
            fsync_path(file)
    fsync_path(temporary)
    os.rename(temporary, path)


def sha256_file(path: Path, of_every_mib: int = 1 << 20) -> str:
    """Return the hex sha256 of a file's bytes, or of the first so many of every MiB."""
    digest, start = hashlib.sha256(), 0
    with path.open("rb") as stream:
        while block := stream.read(of_every_mib):
            digest.update(block)
            start = stream.seek(start + (1 << 20))
    return digest.hexdigest()
