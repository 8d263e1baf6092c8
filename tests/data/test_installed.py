"""Installed packages and the standard library: which licenses are read, and what of a file."""

import ast
import itertools
import sys
from collections.abc import Iterator
from email.message import Message
from pathlib import Path

import pytest

from fastdraft_hf.data import installed
from fastdraft_hf.data.installed import TASKS, passage_instructions, passages
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


PROSE = (
    "The reader opens a file and goes through it line by line. It keeps what it has seen, so that "
    "a file that is cut off in the middle is gone on with where it was left when it is read again."
)


def test_paragraphs_of_prose_are_passages_on_one_line() -> None:
    wrapped = PROSE.replace("line by line. ", "line by\n    line. ")
    text = f"Title\n=====\n\n{wrapped}\n \n- a list\n- of things\n\n{PROSE[:-1]}!"
    assert list(passages([text])) == [PROSE, PROSE[:-1] + "!"]


@pytest.mark.parametrize(
    "other",
    [
        PROSE.replace("a file", "a `file`"),  # markup
        PROSE.replace("It keeps", "See https://example.org. It keeps"),
        PROSE.replace("reader", "Reader[int]"),
        PROSE[0].lower() + PROSE[1:],  # the middle of something
        PROSE[:-1] + ":",
        PROSE[: PROSE.index("It keeps")].strip(),  # too short
        " ".join([PROSE] * 5),  # too long
        " ".join(["Wonderful Documentation Maintainers"] * 12) + ".",  # names
        "",
    ],
)
def test_what_is_no_prose_is_left_out(other: str) -> None:
    assert list(passages([other])) == []


def test_tasks_follow_their_seed_and_the_first_stay_the_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    read: list[str] = []

    def docstrings(path: Path) -> Iterator[str]:
        read.append(path.name)
        yield PROSE.replace("file", path.stem)

    files = [Path(f"f{n}.py") for n in range(40)]
    monkeypatch.setattr(installed, "licenses", lambda: {"one": "MIT"})
    monkeypatch.setattr(installed, "description", lambda name: PROSE)
    monkeypatch.setattr(installed, "package_files", lambda: files[:20])
    monkeypatch.setattr(installed, "library_files", lambda: files[20:])
    monkeypatch.setattr(installed, "docstrings", docstrings)
    every = list(passage_instructions(3))
    assert every == list(passage_instructions(3)) != list(passage_instructions(4))
    assert len(set(every)) == 41  # a package's description and 40 files
    read.clear()
    assert list(itertools.islice(passage_instructions(3), 5)) == every[:5]
    assert len(read) <= 5  # files are read as they are needed
    used = {task for task in TASKS for text in every if text.startswith(task.split("{}")[0])}
    assert len(used) > 10
