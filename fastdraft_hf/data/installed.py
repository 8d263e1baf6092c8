"""Installed packages as a corpus: their Python source, descriptions and docstrings, by license.

Read are packages whose metadata name a permissive license; the others are left out and counted.
What a package's metadata say is taken at its word: a vendored file may have another license.
"""

from __future__ import annotations

import ast
import fnmatch
import hashlib
import re
from collections import Counter
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
_WORDINGS = [
    (re.compile(r"\bapache\b", re.I), "Apache-2.0"),
    (re.compile(r"\b(?:mit|expat)\b", re.I), "MIT"),
    (re.compile(r"\bbsd\b", re.I), "BSD"),
    (re.compile(r"\bisc\b", re.I), "ISC"),
    (re.compile(r"\bpython software foundation\b|\bpsf", re.I), "PSF-2.0"),
    (re.compile(r"\bunlicense\b", re.I), "Unlicense"),
    (re.compile(r"\bzlib\b", re.I), "Zlib"),
    (re.compile(r"\bhpnd\b", re.I), "HPND"),
]
_RESTRICTIVE = re.compile(r"gpl|copyleft|mozilla|\bmpl|proprietary|commercial|eula|nvidia", re.I)
_SHORTEST_DOC = 80  # characters; shorter docstrings are labels

_LEFT_OUT_FOLDERS = {"test", "tests", "testing", "__pycache__", "_vendor", "vendor", "third_party"}


def license_of(package: Message) -> str | None:
    """Return the license a package names, if it is a permissive one.

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
        name = next((name for wording, name in _WORDINGS if wording.search(text)), None)
        if name is None or _RESTRICTIVE.search(text):
            return None
        found.append(name)
    return " AND ".join(dict.fromkeys(found)) or None


def _message(found: metadata.PackageMetadata) -> Message:
    """Return metadata as the mail message that they are."""
    return cast(Message, found)


def _permits(expression: str) -> bool:
    """Return whether an SPDX expression is permissive; one choice of ``OR`` is enough."""
    if re.search(r"\bWITH\b", expression):
        expression = re.sub(r"\s+WITH\s+\S+", "", expression)
    words = re.findall(r"[\w.+-]+", expression)
    names = [word.upper() for word in words if word.upper() not in ("AND", "OR")]
    known = [name in _PERMISSIVE for name in names]
    if all(known):
        return bool(known)
    return "AND" not in words and "(" not in expression and any(known)


@lru_cache(maxsize=8)
def packages(pattern: str = "") -> tuple[tuple[tuple[str, str, str], ...], int]:
    """Return the permissively licensed packages and how many were left out.

    Args:
        pattern: a glob of their names; empty for all.

    Returns:
        (name, version, license) of each, sorted; and the number of the others.
    """
    found: dict[str, tuple[str, str, str]] = {}
    left_out: set[str] = set()
    for package in metadata.distributions():
        name = str(package.metadata["Name"] or "").lower()
        if not name or (pattern and not fnmatch.fnmatch(name, pattern.lower())):
            continue
        license = license_of(_message(package.metadata))
        if license is None:
            left_out.add(name)
        else:
            found.setdefault(name, (name, package.version, license))
    return tuple(found[name] for name in sorted(found)), len(left_out - found.keys())


def packages_digest(pattern: str = "") -> str:
    """Return what changes when the packages, their versions or their licenses do."""
    return hashlib.sha256(repr(packages(pattern)[0]).encode()).hexdigest()


def licenses(pattern: str = "") -> dict[str, str]:
    """Return the license of every package that is read."""
    return {name: license for name, _, license in packages(pattern)[0]}


def source_files(pattern: str = "") -> list[Path]:
    """Return the Python files of the packages, without their tests and what they vendor."""
    files: set[Path] = set()
    for name, _, _ in packages(pattern)[0]:
        for file in metadata.distribution(name).files or []:
            parts = set(file.parts[:-1])
            if file.suffix == ".py" and ".." not in parts and not parts & _LEFT_OUT_FOLDERS:
                files.add(Path(str(file.locate())))
    return sorted(path for path in files if path.is_file())


def description(name: str) -> str:
    """Return a package's long description: what its page in the registry shows."""
    found = _message(metadata.metadata(name))
    return str(found.get("Description") or found.get_payload() or "")


def docstrings(path: Path) -> Iterator[str]:
    """Yield the docstrings of a Python file, of modules, classes and functions."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError, OSError, RecursionError):
        return
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node)
            if text and len(text) >= _SHORTEST_DOC:
                yield text


def license_counts(pattern: str = "") -> dict[str, int]:
    """Return how many packages have which license."""
    return dict(Counter(licenses(pattern).values()).most_common())
