"""The standard library's own Python source: a code corpus every machine has (PSF license)."""

from __future__ import annotations

import ast
import sysconfig
import textwrap
from collections.abc import Iterator
from pathlib import Path

# Test code repeats itself and its data tables are no code; site-packages differ by machine.
_LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "__pycache__", "lib2to3"}


def source_files() -> list[Path]:
    """Return the standard library's Python files, sorted, without tests and site-packages."""
    root = Path(sysconfig.get_paths()["stdlib"])
    return sorted(
        path
        for path in root.rglob("*.py")
        if not _LEFT_OUT & set(path.relative_to(root).parts) and path.is_file()
    )


def documents() -> Iterator[str]:
    """Yield the text of every source file."""
    for path in source_files():
        try:
            yield path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue


def documented_functions() -> Iterator[tuple[ast.FunctionDef | ast.AsyncFunctionDef, list[str]]]:
    """Yield every function with a docstring and a body after it, and its file's lines."""
    for text in documents():
        try:
            tree = ast.parse(text)
        except SyntaxError:
            continue
        lines = text.split("\n")
        for node in ast.walk(tree):
            if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                continue
            if len(node.body) > 1 and ast.get_docstring(node) is not None:
                yield node, lines


def function_heads(min_chars: int = 60, max_chars: int = 900) -> Iterator[str]:
    """Yield signature and docstring of every documented function, dedented.

    They are the shape of a "complete this function" prompt; the body is left to the target.
    """
    for node, lines in documented_functions():
        head = textwrap.dedent("\n".join(lines[node.lineno - 1 : node.body[0].end_lineno]))
        if min_chars <= len(head) <= max_chars:
            yield head
