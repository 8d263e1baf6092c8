import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from safetensors.torch import load_file
from tiny_training import QUIET, Killed, completions, kill_at, losses, run, same, section
from transformers import TrainerControl, TrainerState, TrainingArguments

from fastdraft_hf import DraftDistillationConfig, DraftDistillationTrainer, FastDraftError
from fastdraft_hf.train.callbacks import (
    MarkCompleteCheckpoints,
    newest_complete,
    open_checkpoint,
    read_stream_state,
)

FILES = (
    "model.safetensors",
    "optimizer.pt",
    "scheduler.pt",
    "trainer_state.json",
    "rng_state_1.pth",
    "stream.json",
)


def make(folder: Path, step: int, complete: bool) -> Path:
    path = folder / f"checkpoint-{step}"
    path.mkdir()
    for name in FILES:
        (path / name).write_text(f"{name} of step {step}")
    if complete:
        state = TrainerState(global_step=step, is_world_process_zero=True)
        arguments = TrainingArguments(output_dir=str(folder), report_to="none", use_cpu=True)
        MarkCompleteCheckpoints().on_save(arguments, state, TrainerControl())
    return path


def test_the_newest_complete_one(tmp_path: Path) -> None:
    make(tmp_path, 9, complete=True)
    newest = make(tmp_path, 10, complete=True)  # as text, 9 would come after 10
    make(tmp_path, 11, complete=False)
    assert newest_complete(tmp_path) == newest


def test_a_position_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "stream.json").write_text("[" * 100_000)
    with pytest.raises(FastDraftError, match=r"stream\.json is damaged: not valid JSON"):
        read_stream_state(tmp_path)


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGES = {
    "flip": flip,
    "cut": lambda file: file.write_bytes(file.read_bytes()[:-3]),
    "empty": lambda file: file.write_bytes(b""),
    "delete": Path.unlink,
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", [*FILES, "complete"])
def test_a_damaged_checkpoint_is_moved_aside(
    tmp_path: Path, name: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    before, newest = (make(tmp_path, step, complete=True) for step in (9, 10))
    assert open_checkpoint(True, tmp_path) == newest
    DAMAGES[damage](newest / name)
    assert open_checkpoint(True, tmp_path) == before
    if (name, damage) == ("complete", "delete"):  # as a kill while saving leaves it
        assert caplog.messages == []
    else:
        (line,) = caplog.messages
        assert f"checkpoint-10: {name} is damaged" in line
        assert list(tmp_path.glob("damaged-checkpoint-10-*"))
        assert not newest.exists()
    DAMAGES["flip"](before / "optimizer.pt")
    assert open_checkpoint(True, tmp_path) is None


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (shutil.rmtree, "there is no such folder"),
        (lambda folder: (folder / "trainer_state.json").unlink(), "it holds no trainer_state.json"),
        (lambda folder: (folder / "complete").unlink(), "not saved to its end, or by another"),
        (lambda folder: (folder / "complete").write_text(""), "or of an older version"),
        (lambda folder: flip(folder / "optimizer.pt"), "optimizer.pt is damaged or missing; give"),
    ],
)
def test_a_checkpoint_given_by_hand_is_refused(
    tmp_path: Path, damage: Callable[[Path], Any], reason: str, start_model: Path
) -> None:
    """Before any work, and in one line; nothing is moved."""
    trainer = DraftDistillationTrainer(
        str(start_model),
        DraftDistillationConfig(str(tmp_path), **QUIET),
        train_dataset=datasets.Dataset.from_list(completions(8)),
    )
    path = make(tmp_path, 9, complete=True)
    damage(path)
    before = sorted(tmp_path.rglob("*"))
    line = f"resume_from_checkpoint: {path}: .*{reason}"
    with pytest.raises(FastDraftError, match=line):
        trainer.train(resume_from_checkpoint=str(path))
    assert sorted(tmp_path.rglob("*")) == before


def test_training_resumes_from_the_checkpoint_before(
    tmp_path: Path, start_model: Path, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = datasets.Dataset.from_list(completions(24))
    for kind in ("train", "eval"):
        rows.save_to_disk(str(tmp_path / kind))
    given = start_model, tiny_tokenizer, tmp_path
    settings = section(max_train_tokens=200)
    whole = run(*given, tmp_path / "whole", settings)
    kill_at(monkeypatch, 5)
    with pytest.raises(Killed):
        run(*given, tmp_path / "killed", settings)
    monkeypatch.undo()
    flip(tmp_path / "killed" / "checkpoint-4" / "optimizer.pt")
    resumed = run(*given, tmp_path / "killed", settings)
    assert losses(resumed) == losses(whole)
    weights = [load_file(tmp_path / k / "model/model.safetensors") for k in ("whole", "killed")]
    assert same(*weights)
    kept = list((tmp_path / "killed").glob("checkpoint-*/complete"))
    assert len(kept) == 2  # the newest may be damaged too


def test_a_process_on_the_cpu_reads_an_optimizer(tmp_path: Path) -> None:
    """`Trainer` resumes with the device of the process, such as cpu:1."""
    torch.save({"state": torch.arange(3)}, tmp_path / "optimizer.pt")
    found = torch.load(tmp_path / "optimizer.pt", map_location=torch.device("cpu", 1))
    assert torch.equal(found["state"], torch.arange(3))
