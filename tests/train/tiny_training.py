"""Rows, settings and kills that the tests of training share."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch

from fastdraft_hf.data.columns import distribution_table
from fastdraft_hf.data.target_logits import top_k_of
from fastdraft_hf.train.callbacks import TrainingProgress
from fastdraft_hf.train.loop import train
from fastdraft_hf.train.section import training_section

Make = Callable[..., Any]
Row = dict[str, Any]
Weights = dict[str, torch.Tensor]

V, K, LENGTH = 288, 5, 8

# Without sampling, warm-up and Muon, so that a step can be compared with a formula.
PLAIN: dict[str, Any] = {
    "sampled_softmax": None,
    "use_muon": False,
    "objective": "ce",
    "warmup_steps": 0,
    "lr_scheduler_type": "linear",
    "learning_rate": 2e-5,
    "adam_beta2": 0.999,
}
QUIET: dict[str, Any] = {
    "head_dtype": "float32",
    "bf16": False,
    "use_cpu": True,
    "report_to": "none",
    "disable_tqdm": True,
}


class Killed(BaseException):
    """Not an `Exception`, so that nothing catches it."""


def kill_at(monkeypatch: pytest.MonkeyPatch, step: int | None) -> None:
    def on_step_end(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == step:
            raise Killed

    monkeypatch.setattr(TrainingProgress, "on_step_end", on_step_end)


def section(**changes: Any) -> Any:
    """Return a training section for batches of four rows of `LENGTH` tokens."""
    settings: dict[str, Any] = {
        "max_length": LENGTH,
        "per_device_train_batch_size": 4,
        "eval_rows": 4,
        "logging_steps": 1,
        "save_steps": 2,
        "disable_tqdm": True,
        "head_dtype": "float32",
    }
    return training_section()(**{**settings, **changes})


def run(start: Path, tokenizer: Any, data: Path, work: Path, settings: Any, **more: Any) -> Any:
    """Train in ``work`` on the sets ``train`` and ``eval`` in ``data``."""
    rows = {f"{k}_dataset": datasets.load_from_disk(str(data / k)) for k in ("train", "eval")}
    more = {"label": "pretrain", **rows, **more}
    return train(start, work, settings, tokenizer=tokenizer, seed=3, device="cpu", **more)


def losses(facts: dict[str, Any]) -> list[float]:
    return [entry["loss"] for entry in facts["log"] if "loss" in entry]


def same(a: Weights, b: Weights) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def completions(count: int = 10, seed: int = 0, longest: int = 12) -> list[Row]:
    """Rows with a prompt of two tokens; one that is all loss, and one without loss."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for number in range(count):
        ids = torch.randint(3, 280, (4 + (5 * number) % (longest - 3),), generator=generator)
        rows.append({"input_ids": ids.tolist(), "labels": [-100, -100, *ids[2:].tolist()]})
    rows[3]["labels"] = list(rows[3]["input_ids"])  # its first token is labelled as well
    rows[6]["labels"] = [-100] * len(rows[6]["labels"])
    return rows


def with_columns(
    rows: list[Row], target: Any, k: int = K, temperature: float = 1.0
) -> datasets.Dataset:
    """Add what ``target`` stores for every labelled token that has a past."""
    parts = []
    for row in rows:
        with torch.no_grad():
            logits = target(torch.tensor([row["input_ids"]])).logits[0, :-1].float()
        count = sum(label != -100 for label in row["labels"][1:])
        kept = top_k_of(logits[len(logits) - count :], k, temperature)
        types = (np.uint16, np.float16, np.float16)
        numbers = (part.numpy().astype(kind) for part, kind in zip(kept, types, strict=True))
        parts.append((len(row["input_ids"]), *numbers))
    table = datasets.table.InMemoryTable(distribution_table(parts, temperature))  # type: ignore[arg-type]
    plain = datasets.Dataset.from_list(rows)
    return datasets.concatenate_datasets([plain, datasets.Dataset(table)], axis=1)
