"""The whole pretrain stage on a corpus, written and streamed."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastdraft_hf.data.task_sets import TASK_NAMES
from fastdraft_hf.recipe import build_recipe
from fastdraft_hf.stages import train
from fastdraft_hf.stages.runner import Run
from fastdraft_hf.target.resolve import Target


@pytest.fixture
def make(
    tmp_path: Path, tiny_target_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., dict[str, Any]]:
    monkeypatch.setattr(Run, "latest_model", lambda self, before=None: tiny_target_folder)
    texts = [f"the cat {n} and the hat {n * n}" for n in range(80)]
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts), encoding="utf-8")

    def run(name: str, **settings: Any) -> dict[str, Any]:
        section = {
            "sources": [{"kind": "files", "name": str(corpus)}],
            "max_train_tokens": 512,
            "max_length": 16,
            "per_device_train_batch_size": 4,
            "eval_rows": 4,
            "save_steps": 4,
            "disable_tqdm": True,
            "head_dtype": "float32",
            **settings,
        }
        recipe = build_recipe({"device": "cpu", "pretrain": section})
        made = Run(recipe, tmp_path / name, Target(tiny_target_folder, "tiny"))
        folder = tmp_path / name / "partial"
        folder.mkdir(parents=True)
        facts = train.run(made, folder, "pretrain")
        left = {p.name for p in folder.iterdir()}
        assert {"model.safetensors", "facts.json", "log.json"} <= left
        assert not left & {"data", "work", "tokens"}
        return facts

    return run


def test_both_ways_train_the_budget(make: Callable[..., dict[str, Any]]) -> None:
    written, stream = make("written"), make("stream", streaming=True)
    for facts in (written, stream):
        assert (facts["steps"], facts["tokens"]) == (8, 512)
        (summary,) = facts["data"]["sources"].values()
        assert summary["tokens"] == 512
        assert set(facts["data"]["held_out"]) == {*TASK_NAMES}
    (read,) = stream["read"].values()
    assert read["tokens"] >= 512
    assert read["dropped"]["held out for evaluation"] >= 1
    assert "read" not in written
