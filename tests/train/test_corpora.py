"""Training on corpora: a stream that is killed and resumed."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_training import LENGTH, Killed, kill_at, losses, section

from fastdraft_hf.data import packing
from fastdraft_hf.data.packing import BlockStream, Encoder
from fastdraft_hf.data.sources import Source
from fastdraft_hf.train.callbacks import newest_complete, read_stream_state
from fastdraft_hf.train.loop import train

STEPS, WINDOW = 11, 6


@pytest.fixture
def source(tmp_path: Path) -> Source:
    path = tmp_path / "text.jsonl"
    texts = ["".join(chr(97 + (n * 7 + i * i) % 26) for i in range(7)) for n in range(60)]
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts), encoding="utf-8")
    return Source(kind="files", name=str(path))


def test_a_killed_stream_resumes_bit_for_bit(
    tmp_path: Path,
    start_model: Path,
    source: Source,
    tiny_tokenizer: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    read_in: list[int] = []  # blocks of every iteration

    class Counting(BlockStream):
        def __iter__(self) -> Any:
            read_in.append(0)
            number = len(read_in) - 1
            for row in super().__iter__():
                read_in[number] += 1
                yield row

    def run(name: str) -> Any:
        stream = Counting([source], Encoder(tiny_tokenizer), length=LENGTH, seed=0)
        settings = section(
            sources=[source],
            max_train_tokens=STEPS * 4 * LENGTH,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            save_steps=3,
            streaming=True,
        )
        return train(
            start_model,
            tmp_path / name,
            settings,
            train_dataset=stream.as_dataset(),
            stream=stream,
            tokenizer=tiny_tokenizer,
            seed=3,
            device="cpu",
            label="pretrain",
        )

    monkeypatch.setattr(packing, "WINDOW", WINDOW)
    kill_at(monkeypatch, None)
    whole = run("whole")
    for step in (5, 10):
        kill_at(monkeypatch, step)
        with pytest.raises(Killed):
            run("killed")
    kept = newest_complete(tmp_path / "killed")
    assert kept is not None
    assert kept.name == "checkpoint-9"
    state = read_stream_state(kept)
    assert state["window"] * WINDOW + state["taken"] == 9 * 4
    kill_at(monkeypatch, None)
    resumed = run("killed")
    assert read_in[-1] <= (STEPS - 9 + 1) * 4  # the trainer did not read its way there again
    assert losses(resumed) == losses(whole)
    ours, theirs = (
        load_file(tmp_path / n / "model" / "model.safetensors") for n in ("killed", "whole")
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert resumed["tokens"] == whole["tokens"] == STEPS * 4 * LENGTH
    read = resumed["read"][source.name]
    assert read == whole["read"][source.name]
    assert read["tokens"] >= STEPS * 4 * LENGTH
