"""Installed packages as a corpus: their Python source, descriptions and docstrings, by license.

Only packages whose metadata name a permissive license are read. The metadata are trusted: a
vendored file may have another license.
"""

from __future__ import annotations

import ast
import fnmatch
import re
from collections.abc import Iterator
from email.message import Message
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import cast

_PERMISSIVE = {
    "0BSD", "APACHE-2.0", "BSD-2-CLAUSE", "BSD-3-CLAUSE", "BSD", "BSL-1.0", "CC0-1.0", "HPND",
    "ISC", "MIT", "MIT-0", "MIT-CMU", "NCSA", "PSF-2.0", "PYTHON-2.0", "UNLICENSE", "ZLIB",
    "ZPL-2.1",
}  # fmt: skip
# Trove classifiers and free text of older metadata, by what they contain.
_WORDINGS = {
    r"\bapache\b": "Apache-2.0",
    r"\b(?:mit|expat)\b": "MIT",
    r"\bbsd\b": "BSD",
    r"\bisc\b": "ISC",
    r"\bpython software foundation\b|\bpsf": "PSF-2.0",
    r"\bunlicense\b": "Unlicense",
    r"\bzlib\b": "Zlib",
    r"\bhpnd\b": "HPND",
}
_RESTRICTIVE = re.compile(r"gpl|copyleft|mozilla|\bmpl|proprietary|commercial|eula|nvidia", re.I)
_SHORTEST_DOC = 80  # characters; shorter docstrings are labels
_SKIPPED = {"test", "tests", "testing", "__pycache__", "_vendor", "vendor", "third_party"}


def license_of(package: Message) -> str | None:
    """Return the license that a package's metadata name, if it is a permissive one.

    ``License-Expression`` (SPDX) goes before classifiers, and these before the free text.
    """
    given = {key.lower(): value for key, value in package.items()}
    expression = given.get("license-expression")
    if expression:
        return expression if _permits(expression) else None
    classifiers = [
        value.split("::")[-1]
        for key, value in package.items()
        if key.lower() == "classifier" and value.startswith("License ::")
    ]
    texts = [text for text in classifiers if "OSI Approved" not in text.strip()[:12]]
    first_line = (given.get("license") or "").strip().splitlines()
    if not texts and first_line and len(first_line[0]) < 100:
        texts = [first_line[0]]
    found = []
    for text in texts:
        wording = next((w for w in _WORDINGS if re.search(w, text, re.I)), None)
        if wording is None or _RESTRICTIVE.search(text):
            return None
        found.append(_WORDINGS[wording])
    return " AND ".join(dict.fromkeys(found)) or None


def _permits(expression: str) -> bool:
    """Return whether an SPDX expression is permissive; one choice of ``OR`` is enough."""
    words = re.findall(r"[\w.+-]+", re.sub(r"\s+WITH\s+\S+", "", expression))
    known = [word.upper() in _PERMISSIVE for word in words if word.upper() not in ("AND", "OR")]
    if all(known):
        return bool(known)
    return "AND" not in words and "(" not in expression and any(known)


def _message(found: metadata.PackageMetadata) -> Message:
    return cast(Message, found)  # importlib's type hides that it is one


@lru_cache(maxsize=8)
def packages(pattern: str = "") -> tuple[tuple[tuple[str, str, str], ...], int]:
    """Return the permissively licensed packages and the number of the others.

    Args:
        pattern: a glob of their names; empty for all.

    Returns:
        (name, version, license) of each, sorted; and the number of the others.
    """
    found: dict[str, tuple[str, str, str]] = {}
    skipped: set[str] = set()
    for package in metadata.distributions():
        name = str(package.metadata["Name"] or "").lower()
        if not name or (pattern and not fnmatch.fnmatch(name, pattern.lower())):
            continue
        license = license_of(_message(package.metadata))
        if license is None:
            skipped.add(name)
        else:
            found.setdefault(name, (name, package.version, license))
    return tuple(found[name] for name in sorted(found)), len(skipped - found.keys())


def licenses(pattern: str = "") -> dict[str, str]:
    """Return the license of every package that is read, by name."""
    return {name: license for name, _, license in packages(pattern)[0]}


def source_files(pattern: str = "") -> list[Path]:
    """Return the Python files of the packages, without their tests and what they vendor."""
    files: set[Path] = set()
    for name in licenses(pattern):
        for file in metadata.distribution(name).files or []:
            folders = set(file.parts[:-1])
            if file.suffix == ".py" and ".." not in folders and not folders & _SKIPPED:
                files.add(Path(str(file.locate())))
    return sorted(path for path in files if path.is_file())


def description(name: str) -> str:
    """Return a package's long description, which is its page in the registry."""
    found = _message(metadata.metadata(name))
    return str(found.get("Description") or found.get_payload() or "")


def docstrings(path: Path) -> Iterator[str]:
    """Yield the docstrings of a Python file's modules, classes and functions."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError, OSError, RecursionError):
        return
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node)
            if text and len(text) >= _SHORTEST_DOC:
                yield text
