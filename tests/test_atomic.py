import stat
from pathlib import Path

import pytest

from fastdraft_hf._atomic import atomic_file, atomic_folder


class Killed(BaseException):
    """Stands for Ctrl-C: no `except Exception` may swallow it."""


def kill_after_half(path: Path) -> None:
    path.write_text("half")
    raise Killed


def test_a_failing_block_keeps_the_old_file_and_leaves_no_other(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(Killed), atomic_file(path) as temporary:
        kill_after_half(temporary)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_appears_whole_and_replaces(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "er" / "a.txt"
    with atomic_file(path) as temporary:
        assert temporary.parent == path.parent  # a rename over file systems is no rename
        temporary.write_text("one")
        assert not path.exists()
    assert path.read_text() == "one"
    with atomic_file(path) as temporary:
        temporary.write_text("two")
        assert path.read_text() == "one"
    assert path.read_text() == "two"
    assert list(path.parent.iterdir()) == [path]
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


def test_a_failing_block_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(Killed), atomic_folder(tmp_path / "f") as temporary:
        kill_after_half(temporary / "a")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_appears_whole(tmp_path: Path) -> None:
    path = tmp_path / "up" / "f"
    with atomic_folder(path) as temporary:
        (temporary / "sub").mkdir()
        (temporary / "sub" / "a").write_text("a")
        assert not path.exists()
    assert (path / "sub" / "a").read_text() == "a"
    assert list(path.parent.iterdir()) == [path]
    assert stat.S_IMODE(path.stat().st_mode) == 0o755


def test_a_finished_folder_is_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "f"
    with atomic_folder(path) as temporary:
        (temporary / "a").write_text("first")
    with pytest.raises(OSError, match="not empty"), atomic_folder(path) as temporary:
        (temporary / "a").write_text("second")
    assert (path / "a").read_text() == "first"
    assert list(tmp_path.iterdir()) == [path]
