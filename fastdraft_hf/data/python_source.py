"""The standard library's own Python source: code that every machine has (PSF license)."""

from __future__ import annotations

import ast
import sysconfig
import textwrap
from collections.abc import Iterator
from pathlib import Path

# Tests repeat themselves, and site-packages differ from machine to machine.
_SKIPPED = {"test", "tests", "idle_test", "site-packages", "__pycache__", "lib2to3"}


def source_files() -> list[Path]:
    """Return the standard library's Python files, sorted, without tests and site-packages."""
    root = Path(sysconfig.get_paths()["stdlib"])
    return sorted(
        path
        for path in root.rglob("*.py")
        if not _SKIPPED & set(path.relative_to(root).parts) and path.is_file()
    )


def documented_functions() -> Iterator[tuple[ast.FunctionDef | ast.AsyncFunctionDef, list[str]]]:
    """Yield every function that has a docstring and a body after it, with its file's lines."""
    for path in source_files():
        try:
            text = path.read_text(encoding="utf-8")
            tree = ast.parse(text)
        except (UnicodeDecodeError, SyntaxError):
            continue
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
