"""Which files of a folder belong in a draft's repository, and how they are made fit to be read."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastdraft_hf._card import DRAFT_FILES
from fastdraft_hf._errors import FastDraftError
from fastdraft_hf._redact import holds_token, redacted
from fastdraft_hf.hub.custom_generate import custom_generate_files

# What optimum-intel writes. Its .bin files hold numbers only; an .xml beside each says which.
_OPENVINO_SUFFIXES = {".xml", ".bin", ".json", ".jinja", ".txt", ".model"}
CARD, PROVENANCE = "README.md", "provenance.json"
_TEXTS = {".md", ".json", ".txt", ".jinja", ".py"}
_LOCAL_PATH = re.compile(
    r"(?<![\w/.:>-])(/(?:home|root|Users|tmp|work|mnt|data|scratch)/[^\s\"'`)]+)"
)


@dataclass(frozen=True)
class RepoFile:
    """One file of a commit.

    Attributes:
        path: where it goes in the repository.
        content: the file on this machine, or the bytes themselves.
    """

    path: str
    content: Path | bytes

    @property
    def size(self) -> int:
        """Bytes."""
        return len(self.content) if isinstance(self.content, bytes) else self.content.stat().st_size

    def text(self) -> str | None:
        """Return it as text, ``None`` for what is no text."""
        if Path(self.path).suffix not in _TEXTS and "." in self.path:
            return None
        content = self.content if isinstance(self.content, bytes) else self.content.read_bytes()
        return content.decode("utf-8", errors="replace")


def draft_files(draft: Path) -> list[RepoFile]:
    """Return the checkpoint's own files.

    Raises:
        FastDraftError: weights, configuration or tokenizer are missing.
    """
    found = {f for pattern in DRAFT_FILES for f in draft.glob(pattern) if f.is_file()}
    names = {f.name for f in found}
    if not any(name.endswith(".safetensors") for name in names):
        raise FastDraftError(f"{draft} holds no .safetensors weights; nothing else is pushed")
    for name, what in (("config.json", "configuration"), ("tokenizer_config.json", "tokenizer")):
        if name not in names:
            raise FastDraftError(f"{draft} holds no {what} ({name})")
    # A draft that no stage card assembled has no way to our loop yet.
    given = {} if "generate.py" in names else custom_generate_files()
    files = [RepoFile(f.relative_to(draft).as_posix(), f) for f in sorted(found)]
    return files + [RepoFile(path, content) for path, content in given.items()]


def openvino_files(folders: list[Path]) -> list[RepoFile]:
    """Return the files of the draft's OpenVINO folders, each under its folder's name."""
    files = []
    for folder in folders:
        for file in sorted(folder.iterdir()):
            whole = file.suffix != ".bin" or file.with_suffix(".xml").is_file()
            if file.is_file() and file.suffix in _OPENVINO_SUFFIXES and whole:
                files.append(RepoFile(f"{folder.name}/{file.name}", file))
    return files


def provenance_file(records: dict[str, dict[str, Any]]) -> RepoFile:
    """Return the records of all stages as one file, without paths and credentials."""

    def clean(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: clean(one) for key, one in value.items()}
        if isinstance(value, list):
            return [clean(one) for one in value]
        return without_paths(redacted(value)) if isinstance(value, str) else value

    text = json.dumps(clean(records), indent=2, ensure_ascii=False) + "\n"
    return RepoFile(PROVENANCE, text.encode())


def without_paths(text: str) -> str:
    """Return a text with this machine's absolute paths cut down to their last part."""
    home = str(Path.home())
    words = []
    for word in text.split(" "):
        key, mark, value = word.rpartition("=")
        local = value.startswith("/") and value.count("/") > 1
        words.append(f"{key}{mark}{Path(value).name}" if local else word)
    return " ".join(words).replace(home, "~") if len(home) > 1 else " ".join(words)


def check_files(files: list[RepoFile], token: str | None) -> None:
    """Refuse files that hold a credential, or a card that names a path of this machine.

    Raises:
        FastDraftError: naming the file.
    """
    for file in files:
        text = file.text()
        if text is None:
            continue
        if holds_token(text, token):
            raise FastDraftError(f"{file.path} holds what looks like a token; nothing is pushed")
        found = _LOCAL_PATH.search(text) if file.path == CARD else None
        if found is not None:
            raise FastDraftError(
                f"{CARD} names a path of this machine, {found.group(1)}; write what others should "
                "read there"
            )
