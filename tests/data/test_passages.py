"""Tasks about passages: prose of the machine's documentation, each asked about once."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastdraft_hf.data import passages as module
from fastdraft_hf.data.passages import TASKS, passage_instructions, passages

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
    monkeypatch.setattr(module.installed, "licenses", lambda: {"one": "MIT"})
    monkeypatch.setattr(module.installed, "description", lambda name: PROSE)
    monkeypatch.setattr(module.installed, "package_files", lambda: files[:20])
    monkeypatch.setattr(module.installed, "library_files", lambda: files[20:])
    monkeypatch.setattr(module.installed, "docstrings", docstrings)
    every = list(passage_instructions(3))
    assert every == list(passage_instructions(3)) != list(passage_instructions(4))
    assert len(set(every)) == 41  # a package's description and 40 files
    read.clear()
    assert list(itertools.islice(passage_instructions(3), 5)) == every[:5]
    assert len(read) <= 5  # files are read as they are needed
    used = {task for task in TASKS for text in every if text.startswith(task.split("{}")[0])}
    assert len(used) > 10
