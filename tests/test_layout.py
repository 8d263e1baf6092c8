"""The folders' one-way rule: a folder imports those above it in the list, never those below."""

import ast
from pathlib import Path

import pytest

import fastdraft_hf

PACKAGE = Path(fastdraft_hf.__file__).parent
ORDER = [
    "target",
    "draft",
    "data",
    "train",
    "export",
    "decode",
    "eval",
    "tune",
    "hub",
]
SEES_ALL = {"recipe", "stages", "plan", "cli"}


def imported_rooms(path: Path) -> set[str]:
    """Return the folders and modules of the package that a file imports, at any depth."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "fastdraft_hf" and len(parts) > 1:
                found.add(parts[1])
    return found


@pytest.mark.parametrize("room", ORDER)
def test_a_folder_imports_only_those_above_it(room: str) -> None:
    below = {*ORDER[ORDER.index(room) + 1 :], *SEES_ALL}
    files = list((PACKAGE / room).rglob("*.py"))
    assert files
    wrong = {str(p.relative_to(PACKAGE)): imported_rooms(p) & below for p in files}
    assert {path: rooms for path, rooms in wrong.items() if rooms} == {}


def test_no_call_of_transformers_may_ask_to_run_a_models_code() -> None:
    """Without ``trust_remote_code`` it asks on the terminal, and a yes runs the code."""
    wrong = []
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                name = ast.unparse(node.func)
                said = {keyword.arg for keyword in node.keywords} & {None, "trust_remote_code"}
                if name.startswith("Auto") and name.endswith(".from_pretrained") and not said:
                    wrong.append(f"{path.name}: {name}")
    assert wrong == []


def test_shared_modules_import_no_folder() -> None:
    for path in PACKAGE.glob("_[a-z]*.py"):
        assert imported_rooms(path) & {*ORDER, *SEES_ALL} == set(), path.name


def test_every_folder_is_known() -> None:
    folders = {p.name for p in PACKAGE.iterdir() if (p / "__init__.py").exists()}
    assert folders == {*ORDER, *SEES_ALL} - {"recipe"}
