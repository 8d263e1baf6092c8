"""Installed packages and the standard library: which licenses are read, and what of a file."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from email.message import Message
from pathlib import Path

import pytest

from fastdraft_hf.data import installed
from fastdraft_hf.data.sources import Documents, Source

DOC = "Adds two numbers and says nothing more about it than this sentence, which is long enough."


def metadata(**fields: str | list[str]) -> Message:
    message = Message()
    for key, value in fields.items():
        for one in [value] if isinstance(value, str) else value:
            message[key.replace("_", "-")] = one
    return message


@pytest.mark.parametrize(
    ("fields", "license"),
    [
        ({"License_Expression": "MIT"}, "MIT"),
        ({"License_Expression": "Apache-2.0 OR GPL-3.0-only"}, "Apache-2.0 OR GPL-3.0-only"),
        ({"License_Expression": "MIT AND GPL-2.0-only"}, None),
        ({"License_Expression": "(MIT OR GPL-2.0) AND MPL-2.0"}, None),
        ({"License_Expression": "LicenseRef-Proprietary"}, None),
        ({"License_Expression": "MIT WITH LLVM-exception"}, "MIT WITH LLVM-exception"),
        ({"Classifier": ["License :: OSI Approved :: BSD License", "Topic :: X"]}, "BSD License"),
        ({"Classifier": ["License :: OSI Approved :: GNU General Public License (GPL)"]}, None),
        ({"Classifier": ["License :: MIT License", "License :: Mozilla Public License"]}, None),
        ({"Classifier": ["License :: OSI Approved"], "License": "BSD-3-Clause"}, "BSD-3-Clause"),
        ({"License": "Apache License 2.0\nwith a long text"}, "Apache License 2.0"),
        ({"License": "NVIDIA Proprietary Software"}, None),
        ({"License": "LGPL, or MIT by arrangement"}, None),
        ({}, None),
    ],
)
def test_licenses(fields: dict[str, str | list[str]], license: str | None) -> None:
    assert installed.license_of(metadata(**fields)) == license


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Two packages, of which one may be read."""
    for name, license in (("fdt-open", "MIT"), ("fdt-closed", "LicenseRef-Closed")):
        module = name.replace("-", "_")
        info = tmp_path / f"{module}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.4\nName: {name}\nVersion: 1.0\nLicense-Expression: {license}\n\n"
            f"{name} adds numbers.\n"
        )
        files = {f"{module}/__init__.py": f'"""{DOC}"""\n', f"{module}/tests/test_a.py": "x = 1\n"}
        files[f"{module}/data.txt"] = "no code"
        for path, text in files.items():
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_text(text)
        (info / "RECORD").write_text("".join(f"{path},,\n" for path in files))
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    installed.licenses.cache_clear()
    yield
    installed.licenses.cache_clear()


@pytest.mark.usefixtures("packages")
def test_what_is_read_of_a_package() -> None:
    assert installed.licenses("fdt-*") == {"fdt-open": "MIT"}
    code = list(Documents(Source(kind="packages", name="fdt-*")))
    assert code == [f'"""{DOC}"""\n']
    docs = list(Documents(Source(kind="package_docs", name="fdt-*")))
    assert sorted(docs) == sorted([DOC, "fdt-open adds numbers."])


def test_this_machine_has_some() -> None:
    """Those that run the tests are permissively licensed and say so."""
    found = installed.licenses()
    assert {"numpy", "transformers", "datasets"} <= found.keys()
    assert len(installed.package_files("datasets")) > 10


def test_files_are_the_library_and_no_tests() -> None:
    files = installed.library_files()
    assert files == sorted(files)
    names = {f.name for f in files}
    assert {"textwrap.py", "json", "decoder.py"} & names == {"textwrap.py", "decoder.py"}
    assert not any({"test", "site-packages", "idle_test"} & set(f.parts) for f in files)


def test_heads_are_signature_and_docstring(heads: list[str]) -> None:
    assert len(heads) > 1000
    assert all(60 <= len(head) <= 900 for head in heads)
    dedent = next(h for h in heads if h.startswith("def dedent(text):"))
    assert dedent.rstrip().endswith('"""')
    assert "re.sub" not in dedent  # the body is left to the target
    parsed = 0
    for head in heads:
        try:
            tree = ast.parse(head)
        except SyntaxError:  # a docstring's own lines may stand left of the code
            continue
        parsed += 1
        (function,) = tree.body
        assert isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef))
        assert len(function.body) == 1
        assert ast.get_docstring(function) is not None
    assert parsed > 0.95 * len(heads)
