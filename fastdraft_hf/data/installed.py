"""Text that is on every machine, and prompts from it: the standard library and installed packages.

Only packages whose metadata name a permissive license are read. The metadata are trusted: a
vendored file may have another license. The standard library has the PSF license.
"""

import ast
import fnmatch
import random
import re
import sysconfig
import textwrap
from collections.abc import Iterable, Iterator
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

from fastdraft_hf._atomic import read_json

# In SPDX expressions, Trove classifiers and free text, by what they contain.
_PERMISSIVE = re.compile(
    r"\b(0bsd|apache|bsd|bsl-1\.0|cc0|expat|hpnd|isc|mit|ncsa|psf|python software foundation"
    r"|unlicense|zlib|zpl)\b",
    re.I,
)
_RESTRICTIVE = re.compile(
    r"gpl|copyleft|mozilla|\bmpl|proprietary|commercial|eula|nvidia|nuclear|licenseref", re.I
)
_SHORTEST_DOC = 80  # characters; shorter docstrings are labels
# Tests repeat themselves, and what a package vendors has another license.
_SKIPPED = {"test", "tests", "testing", "__pycache__", "_vendor", "vendor", "third_party"}
_SKIPPED_OF_LIBRARY = {*_SKIPPED, "idle_test", "site-packages", "lib2to3"}


def license_of(package: Any) -> str | None:
    """Return the license that a package's metadata name, if it is a permissive one.

    ``License-Expression`` (SPDX) goes before classifiers, and these before the free text. One
    permissive choice of ``OR`` is enough.
    """
    classifiers = [
        value.split("::")[-1].strip()
        for value in package.get_all("Classifier", [])
        if value.startswith("License ::") and not value.endswith(":: OSI Approved")
    ]
    first_line = (package.get("License") or "").strip().splitlines()[:1]
    expression = package.get("License-Expression")
    texts = [expression] if expression else classifiers or first_line
    for text in texts:
        if not any(map(_permits, [text] if "(" in text or " AND " in text else text.split(" OR "))):
            return None
    return " AND ".join(texts) or None


def _permits(text: str) -> bool:
    found = all(_PERMISSIVE.search(part) for part in text.split(" AND "))
    return found and not _RESTRICTIVE.search(text)


@lru_cache(maxsize=8)
def licenses(pattern: str = "") -> dict[str, str]:
    """Return the license of every permissively licensed package, by name, sorted.

    Args:
        pattern: a glob of their names; empty for all.
    """
    found: dict[str, str] = {}
    for package in metadata.distributions():
        name = str(package.metadata["Name"] or "").lower()
        if name and fnmatch.fnmatch(name, pattern.lower() or "*"):
            license = license_of(package.metadata)
            if license is not None:
                found.setdefault(name, license)
    return dict(sorted(found.items()))


def package_files(pattern: str = "") -> list[Path]:
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
    found: Any = metadata.metadata(name)  # a Message, which its type hides
    return str(found.get("Description") or found.get_payload() or "")


def library_files() -> list[Path]:
    """Return the standard library's Python files, sorted, without tests and site-packages."""
    root = Path(sysconfig.get_paths()["stdlib"])
    return sorted(
        path
        for path in root.rglob("*.py")
        if not _SKIPPED_OF_LIBRARY & set(path.relative_to(root).parts) and path.is_file()
    )


def _parse(path: Path) -> tuple[str, ast.Module]:
    """Return a file's text and its tree, which is empty if it is not Python in UTF-8."""
    try:
        text = path.read_text(encoding="utf-8")
        return text, ast.parse(text)
    except (SyntaxError, ValueError, OSError, RecursionError):
        return "", ast.Module([], [])


def docstrings(path: Path) -> Iterator[str]:
    """Yield the docstrings of a Python file's modules, classes and functions."""
    for node in ast.walk(_parse(path)[1]):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node)
            if text and len(text) >= _SHORTEST_DOC:
                yield text


def documented_functions() -> Iterator[tuple[ast.FunctionDef | ast.AsyncFunctionDef, list[str]]]:
    """Yield the library's functions that have a docstring and a body, with their file's lines."""
    for path in library_files():
        text, tree = _parse(path)
        lines = text.split("\n")
        for node in ast.walk(tree):
            if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                continue
            if len(node.body) > 1 and ast.get_docstring(node) is not None:
                yield node, lines


def function_heads() -> Iterator[str]:
    """Yield signature and docstring of every documented function, dedented.

    Those of 60 to 900 characters make "complete this function" prompts; the target writes the body.
    """
    for node, lines in documented_functions():
        head = textwrap.dedent("\n".join(lines[node.lineno - 1 : node.body[0].end_lineno]))
        if 60 <= len(head) <= 900:
            yield head


# Much of what a target answers repeats words of its prompt, and a draft has to learn to copy them.
# Magpie seldom generates a prompt that holds a text.
# So these ask about a passage, which is {}.
TASKS = read_json(Path(__file__).with_name("passage_tasks.json"))
_SHORTEST, _LONGEST = 25, 140  # words
# Markup, tables, lists, code and links are not prose.
_MARKUP = re.compile(r"[`|<>{}\\=#*_]|https?:|::|>>>|\.\. |---|\[|\]")
_WORD = re.compile(r"[A-Za-z][A-Za-z'’-]*")


def passages(texts: Iterable[str]) -> Iterator[str]:
    """Yield the paragraphs that are prose, each on one line."""
    for text in texts:
        for paragraph in re.split(r"\n\s*\n", text):
            line = " ".join(paragraph.split())
            words = _WORD.findall(line)
            if not _SHORTEST <= len(words) <= _LONGEST or _MARKUP.search(line):
                continue
            # A sentence begins with a capital letter and ends with a stop; names and numbers in a
            # row (lists of authors, versions) have few short words.
            short = sum(len(word) <= 4 for word in words)
            if line[0].isupper() and line[-1] in ".!?" and short >= 0.3 * len(words):
                yield line


def passage_instructions(seed: int) -> Iterator[str]:
    """Yield an instruction about every passage on this machine, in the seed's order.

    Files are read when they are needed. The passages change with the installed packages.
    """
    chosen = random.Random(seed)
    documents: list[str | Path] = list(licenses())
    documents += [*package_files(), *library_files()]
    chosen.shuffle(documents)
    for document in documents:
        if isinstance(document, str):
            texts: Iterable[str] = [description(document)]
        else:
            texts = docstrings(document)
        for passage in passages(texts):
            yield chosen.choice(TASKS).format(passage)
