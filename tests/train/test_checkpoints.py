from __future__ import annotations

from pathlib import Path

import torch
from transformers import TrainerControl, TrainerState, TrainingArguments

from fastdraft_hf.train.callbacks import MarkCompleteCheckpoints, newest_complete


def make(folder: Path, step: int, complete: bool) -> Path:
    path = folder / f"checkpoint-{step}"
    path.mkdir()
    (path / "model.safetensors").write_text("weights")
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


def test_a_process_on_the_cpu_reads_an_optimizer(tmp_path: Path) -> None:
    """`Trainer` resumes with the device of the process, such as cpu:1."""
    torch.save({"state": torch.arange(3)}, tmp_path / "optimizer.pt")
    found = torch.load(tmp_path / "optimizer.pt", map_location=torch.device("cpu", 1))
    assert torch.equal(found["state"], torch.arange(3))
