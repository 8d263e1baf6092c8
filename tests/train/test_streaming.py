"""Streamed data: a budget of tokens over several passes, killed and resumed."""

from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from tiny_training import Killed, Make, completions, with_columns
from transformers import TrainerCallback

from fastdraft_hf.train.callbacks import newest_complete
from fastdraft_hf.train.trainer import DraftDistillationTrainer

ROWS, SHARDS = 15, 3
# The rows have 117 tokens: the budget ends in the third pass.
BUDGET = 330


class KillAfter(TrainerCallback):
    def __init__(self, step: int) -> None:
        self._step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self._step:
            raise Killed


class Seen(TrainerCallback):
    """What is logged, over all runs, as bits."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any
    ) -> None:
        if "loss" in logs:
            self.losses.append(logs["loss"])


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory, tiny_model: Make) -> Path:
    """The same rows in several files, as parquet and as jsonl."""
    folder = tmp_path_factory.mktemp("shards")
    rows = with_columns(completions(ROWS), tiny_model(seed=5, num_hidden_layers=1))
    for number in range(SHARDS):
        shard = rows.shard(SHARDS, number)
        shard.to_parquet(folder / f"{number}.parquet")
        shard.to_json(folder / f"{number}.jsonl")
    return folder


def stream_of(shards: Path, kind: str, *, stored: bool) -> Any:
    opened = datasets.load_dataset(
        {"jsonl": "json"}.get(kind, kind),
        data_files=str(shards / f"*.{kind}"),
        split="train",
        streaming=True,
    )
    return opened if stored else opened.select_columns(["input_ids", "labels"])


@pytest.fixture
def run(trainer: Make, tmp_path: Path, tiny_model: Make) -> Make:
    def make(
        name: str,
        dataset: Any,
        *callbacks: TrainerCallback,
        resume: Path | None = None,
        **settings: Any,
    ) -> DraftDistillationTrainer:
        defaults = {
            "output_dir": str(tmp_path / name),
            "per_device_train_batch_size": 2,
            "max_train_tokens": str(BUDGET),
            "learning_rate": 5e-3,
            "save_strategy": "steps",
            "save_steps": 3,
            "logging_steps": 1,
        }
        # Dropout, so that the random numbers' state counts as well.
        model = tiny_model(attention_dropout=0.1).train()
        made: DraftDistillationTrainer = trainer(
            dataset, model, callbacks=list(callbacks), **{**defaults, **settings}
        )
        made.train(resume_from_checkpoint=None if resume is None else str(resume))
        return made

    return make


@pytest.mark.parametrize(
    ("kind", "stored", "shuffled", "settings"),
    [
        ("parquet", False, False, {}),
        # As jsonl: `datasets` sleeps for ten seconds after every shuffled pass over parquet.
        (
            "jsonl",
            True,
            True,
            {"objective": {"ce": 0.5, "kl": 0.5}, "use_muon": True},
        ),
        ("parquet", True, False, {"objective": "kl", "gradient_accumulation_steps": 2}),
    ],
)
def test_killed_and_resumed_is_uninterrupted(
    run: Make,
    shards: Path,
    tmp_path: Path,
    kind: str,
    stored: bool,
    shuffled: bool,
    settings: dict[str, Any],
) -> None:
    def stream() -> Any:
        opened = stream_of(shards, kind, stored=stored)
        return opened.shuffle(seed=1, buffer_size=6) if shuffled else opened

    whole, pieces = Seen(), Seen()
    through = run("through", stream(), whole, **settings)
    steps = through.state.global_step
    assert through.state.num_input_tokens_seen >= BUDGET
    # Once in the first pass (15 rows) and once after it.
    for number, after in enumerate((4, steps - 1)):
        checkpoint = newest_complete(tmp_path / "killed")
        assert (checkpoint is None) == (number == 0)
        with pytest.raises(Killed):
            run("killed", stream(), pieces, KillAfter(after), resume=checkpoint, **settings)
        kept = str(newest_complete(tmp_path / "killed")).split("-")[-1]
        del pieces.losses[int(kept) :]  # what was lost
    checkpoint = newest_complete(tmp_path / "killed")
    resumed = run("killed", stream(), pieces, resume=checkpoint, **settings)
    assert pieces.losses == whole.losses
    assert resumed.state.global_step == steps
    assert resumed.state.num_input_tokens_seen == through.state.num_input_tokens_seen
    ours, theirs = (trainer.model.state_dict() for trainer in (resumed, through))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_stream_starts_again_at_its_end(run: Make, shards: Path) -> None:
    seen: list[list[int]] = []

    class Watching(DraftDistillationTrainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            ids, mask = inputs["input_ids"], inputs["attention_mask"].bool()
            seen.extend(row[mask[number]].tolist() for number, row in enumerate(ids))
            return super().compute_loss(model, inputs, *args, **kwargs)

    stream = stream_of(shards, "jsonl", stored=False)
    rows = [row["input_ids"] for row in stream]
    settings = {"max_train_tokens": None, "max_steps": 10, "save_strategy": "no"}
    trainer = run("over", stream, kind=Watching, **settings)
    assert trainer.state.global_step == 10
    assert seen == (rows + rows)[:20]
