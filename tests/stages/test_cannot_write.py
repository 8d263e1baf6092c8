"""A run that cannot write: on a disk that fills up (by the limit of a file's size), or at all."""

import re
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

from fastdraft_hf.cli import main as cli
from fastdraft_hf.stages import provenance


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, tiny_target_folder: Path) -> Path:
    file = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    text = {"kind": "free", "rows": 24, "max_new_tokens": 40, "temperatures": [1.0]}
    recipe = {
        "target": str(tiny_target_folder),
        "device": "cpu",
        "design": {"params": "20k", "num_hidden_layers": 1, "hidden_size": 16},
        "generate": {"engine": "transformers", "sets": {"text": text}},
        "pretrain": {
            "sources": [{"name": "text"}],
            "max_train_tokens": 512,
            "max_length": 64,
            "per_device_train_batch_size": 4,
            "eval_rows": 0,
            "save_steps": 1,
        },
    }
    file.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return file


def run(recipe: Path, folder: Path) -> int:
    stages = ["--stages", "design,generate,pretrain"]
    return cli.main(["run", str(recipe), f"output_dir={folder}", *stages])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, recipe: Path) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    assert run(recipe, folder) == 0
    return folder


@pytest.mark.parametrize("size", [1_000, 6_000, 30_000, 60_000])
def test_a_full_disk_is_one_line_and_the_same_run_afterwards(
    size: int, tmp_path: Path, recipe: Path, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with largest_file(size):
        status = run(recipe, tmp_path)
    line = capsys.readouterr().err.splitlines()[-1]
    assert status == 1
    assert line.startswith(f"fastdraft: {tmp_path}")
    assert "no space left to write; make room and run the same command again" in line
    assert run(recipe, tmp_path) == 0
    assert provenance.weights(tmp_path) == provenance.weights(whole)


@pytest.mark.parametrize("place", ["file", "file/run", "/proc/none/run"])
@pytest.mark.parametrize("cache", [False, True])
def test_a_folder_that_cannot_be_written_is_one_line(
    place: str,
    cache: bool,
    tmp_path: Path,
    recipe: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "file").write_text("mine")
    folder = tmp_path / place
    words = ["run", str(recipe), "--stages", "design"]
    if cache:  # of the packaged target
        monkeypatch.setenv("FASTDRAFT_CACHE", str(folder))
        words += ["target=embedded:smollm2-135m-instruct", f"output_dir={tmp_path / 'run'}"]
    else:
        words.append(f"output_dir={folder}")
    assert cli.main(words) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    named = "/proc/none" if place.startswith("/") else tmp_path / "file"
    reason = "(File exists|Not a directory|No such file or directory)"
    assert re.match(rf"fastdraft: {named}\S*: {reason}$", line), line
    assert (tmp_path / "file").read_text() == "mine"
