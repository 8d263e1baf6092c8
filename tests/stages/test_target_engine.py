"""Stage generate through the engines that a recipe names: servers and settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from data.vllm_server import VLLMServer, deterministic
from transformers import AutoTokenizer

from fastdraft_hf._errors import FastDraftError
from fastdraft_hf.data.engines.server import ServerEngine
from fastdraft_hf.data.generations import read_rows
from fastdraft_hf.recipe import build_recipe
from fastdraft_hf.stages.runner import Run, execute
from fastdraft_hf.stages.target_engine import open_target_engine

SETS = {
    "chat": {"kind": "magpie", "rows": 40, "max_new_tokens": 9},
    "text": {"kind": "free", "rows": 33, "max_new_tokens": 12, "temperatures": [1.0]},
}


def make_run(folder: Path, target: Path, **generate: Any) -> Run:
    recipe = build_recipe(
        {
            "target": str(target),
            "device": "cpu",
            "output_dir": str(folder),
            "generate": {"sets": SETS, "rows_per_shard": 4, "batch_size": 4, **generate},
        }
    )
    return Run(recipe, folder)


def rows_of(folder: Path) -> dict[str, list[dict[str, Any]]]:
    names = ["chat-instructions", "chat", "text"]
    return {name: read_rows(folder / "generate" / name) for name in names}


def test_a_recipe_with_servers(tmp_path: Path, tiny_target_folder: Path) -> None:
    with VLLMServer() as first, VLLMServer() as second:
        run = make_run(tmp_path / "run", tiny_target_folder, server=[first.url, second.url])
        execute(run, ["generate"])
        assert min(first.answered, second.answered) > 10
        facts = json.loads((tmp_path / "run" / "generate" / "provenance.json").read_text())["facts"]
        assert facts["engine"] == "server"
        rows = rows_of(tmp_path / "run")
        assert len(rows["text"]) == 33
        assert rows["chat"]
        for row in rows["chat"]:
            body = {
                "prompt": row["prompt_ids"],
                "temperature": {0: 0.0, 6: 0.6, 8: 0.8, 10: 1.0}[round(row["temperature"] * 10)],
                "top_p": row["top_p"],
                "seed": row["seed"],
                "stop_token_ids": [0, 2],
            }
            assert row["completion_ids"] == deterministic(body)[:9]
        # Where the text is written decides nothing: another server finds the stage finished.
        execute(make_run(tmp_path / "run", tiny_target_folder, server=first.url), ["generate"])
    with pytest.raises(FastDraftError, match=r"other settings .*batch_size"):
        execute(make_run(tmp_path / "run", tiny_target_folder, batch_size=5), ["generate"])


@pytest.mark.parametrize(
    ("generate", "message"),
    [
        ({"engine": "server"}, r"generate\.server: engine server needs the URL"),
        (
            {"engine": "transformers", "server": "http://h"},
            r"generate\.server: engine transformers",
        ),
        ({"server": "somewhere"}, r"generate\.server: 'somewhere' is not a URL"),
    ],
)
def test_settings_that_do_not_fit(
    tmp_path: Path, tiny_target_folder: Path, generate: dict[str, Any], message: str
) -> None:
    with pytest.raises(FastDraftError, match=message):
        execute(make_run(tmp_path / "run", tiny_target_folder, **generate), ["generate"])


def test_the_servers_model_is_the_recipes_target(tmp_path: Path, tiny_target_folder: Path) -> None:
    run = make_run(tmp_path / "run", tiny_target_folder, server="http://127.0.0.1:1")
    tokenizer = AutoTokenizer.from_pretrained(tiny_target_folder)
    with VLLMServer(models=["another"]) as server:
        run.recipe.generate.server = server.url  # type: ignore[union-attr]
        with pytest.raises(FastDraftError, match="serves another, and none is called target"):
            open_target_engine(run, tokenizer)
        run.recipe.generate.server_model = "another"  # type: ignore[union-attr]
        assert isinstance(open_target_engine(run, tokenizer), ServerEngine)
