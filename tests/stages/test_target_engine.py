"""Stage generate through the engines a recipe names: servers, several processes, a draft."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from data.vllm_server import VLLMServer, deterministic
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

import fastdraft_hf.stages.registry  # noqa: F401  (fills STAGES)
from fastdraft_hf._errors import FastDraftError
from fastdraft_hf.data.config import GenerateConfig
from fastdraft_hf.data.engines.transformers import TransformersEngine
from fastdraft_hf.data.engines.vllm import VLLMEngine
from fastdraft_hf.data.generated import read_rows
from fastdraft_hf.data.requests import Request
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
        assert facts["engine"] == "vllm"
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
    with pytest.raises(FastDraftError, match=r"other settings .*rows_per_shard"):
        execute(make_run(tmp_path / "run", tiny_target_folder, rows_per_shard=5), ["generate"])


def test_a_stage_goes_on_with_another_server(tmp_path: Path, tiny_target_folder: Path) -> None:
    with VLLMServer(faults=lambda n, body: "400" if n == 60 else None) as server:
        run = make_run(tmp_path / "run", tiny_target_folder, server=server.url)
        with pytest.raises(FastDraftError, match="refused with HTTP 400"):
            execute(run, ["generate"])
    with VLLMServer() as other:
        execute(make_run(tmp_path / "run", tiny_target_folder, server=other.url), ["generate"])
    rows = rows_of(tmp_path / "run")
    assert len(rows["text"]) == 33
    # What the first server had answered is not asked again, but for the four in flight.
    assert other.answered <= sum(map(len, rows.values())) - 60 + 4


@pytest.mark.parametrize("way", ["forked", pytest.param("command line", marks=pytest.mark.slow)])
def test_three_processes_write_what_one_writes(
    tmp_path: Path, tiny_target_folder: Path, way: str
) -> None:
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "OMP_NUM_THREADS": "1",
    }
    with VLLMServer() as server:
        run = make_run(tmp_path / "alone", tiny_target_folder, server=server.url)
        execute(run, ["generate"])
        recipe = tmp_path / "recipe.yaml"
        shared = make_run(tmp_path / "shared", tiny_target_folder, server=server.url).recipe
        recipe.write_text(yaml.safe_dump(shared.resolved()))
        if way == "forked":
            script = str(Path(__file__).with_name("forked_stage.py"))
            command = [sys.executable, script, str(recipe), "3"]
            subprocess.run(command, env=environment, check=True, timeout=120)
        else:
            command = [sys.executable, "-m", "fastdraft_hf.cli.main", "generate", "--config"]
            processes = [
                subprocess.Popen(
                    [*command, str(recipe)],
                    env={**environment, "RANK": str(index), "WORLD_SIZE": "3"},
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
                for index in range(3)
            ]
            for index, process in enumerate(processes):
                said, errors = process.communicate(timeout=240)
                assert process.returncode == 0, errors
                assert bool(said) == (index == 0)  # the recipe is printed once
    assert rows_of(tmp_path / "shared") == rows_of(tmp_path / "alone")
    assert {p.name for p in (tmp_path / "shared" / "generate").iterdir()} == {
        p.name for p in (tmp_path / "alone" / "generate").iterdir()
    }
    assert not list((tmp_path / "shared").glob(".generate*"))


def test_whole_runs_are_for_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastdraft_hf.cli._running import run_stages

    monkeypatch.setenv("WORLD_SIZE", "2")
    recipe = build_recipe({"output_dir": str(tmp_path / "run"), "generate": {"sets": SETS}})
    with pytest.raises(FastDraftError, match="only generate runs in several"):
        run_stages(recipe, None, dry_run=True)


def save_draft(folder: Path, tiny_model: Callable[..., LlamaForCausalLM], tokenizer: Any) -> Path:
    tiny_model(seed=3, num_hidden_layers=1).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_draft_is_probed_and_greedy_rows_stay(
    tmp_path: Path,
    tiny_target_folder: Path,
    tiny_model: Callable[..., LlamaForCausalLM],
    tiny_tokenizer: PreTrainedTokenizerFast,
    caplog: pytest.LogCaptureFixture,
) -> None:
    draft = save_draft(tmp_path / "draft", tiny_model, tiny_tokenizer)
    run = make_run(tmp_path / "run", tiny_target_folder, engine="transformers", draft=str(draft))
    tokenizer = AutoTokenizer.from_pretrained(tiny_target_folder)
    engine = open_target_engine(run, tokenizer)
    requests = [Request(i, (5, 9 + i, 30), 0.0, i, 12, "s") for i in range(14)]
    with caplog.at_level(logging.INFO):
        done = sorted(engine.generate(requests, lambda n: None), key=lambda c: c.request.index)
    assert "tokens/s without the draft" in caplog.text
    plain = TransformersEngine(tiny_target_folder, {0, 2}, 4)
    alone = sorted(plain.generate(requests, lambda n: None), key=lambda c: c.request.index)
    assert [c.ids for c in done] == [c.ids for c in alone]


@pytest.mark.parametrize(
    ("generate", "message"),
    [
        ({"engine": "vllm"}, r"generate\.server: engine vllm needs the URL"),
        ({"engine": "transformers", "server": "http://h"}, r"generate\.engine: transformers has"),
        ({"server": "somewhere"}, r"generate\.server: 'somewhere' is no URL"),
        ({"server": "http://h", "draft": "d"}, r"generate\.draft: a vllm server drafts by"),
        ({"engine": "transformers", "draft": "none"}, r"generate\.draft: none is no folder of a"),
    ],
)
def test_settings_that_do_not_fit(
    tmp_path: Path, tiny_target_folder: Path, generate: dict[str, Any], message: str
) -> None:
    run = make_run(tmp_path / "run", tiny_target_folder, **generate)
    with pytest.raises(FastDraftError, match=message):
        execute(run, ["generate"])


def test_a_draft_of_another_vocabulary(
    tmp_path: Path,
    tiny_target_folder: Path,
    tiny_model: Callable[..., LlamaForCausalLM],
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_target_folder)
    tokenizer.add_tokens(["<more>"])
    draft = save_draft(tmp_path / "draft", tiny_model, tokenizer)
    run = make_run(tmp_path / "run", tiny_target_folder, engine="transformers", draft=str(draft))
    with pytest.raises(FastDraftError, match="its vocabulary is not the target's"):
        execute(run, ["generate"])


def test_an_openvino_draft_for_transformers(
    tmp_path: Path,
    tiny_target_folder: Path,
    tiny_model: Callable[..., LlamaForCausalLM],
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    draft = save_draft(tmp_path / "draft", tiny_model, tiny_tokenizer)
    (draft / "openvino_model.xml").touch()
    run = make_run(tmp_path / "run", tiny_target_folder, engine="transformers", draft=str(draft))
    with pytest.raises(FastDraftError, match="wants the draft's PyTorch folder"):
        execute(run, ["generate"])


def test_one_server_or_several() -> None:
    assert build_recipe({"generate": {"server": "http://a"}}).generate.servers == ["http://a"]  # type: ignore[union-attr]
    several = build_recipe({"generate": {"server": ["http://a", "http://b"]}}).generate
    assert several is not None
    assert several.servers == ["http://a", "http://b"]
    kinds = GenerateConfig.model_json_schema()["properties"]["server"]["anyOf"]
    assert {kind["type"] for kind in kinds} == {"string", "array", "null"}


@pytest.mark.parametrize("name", ["batch_size", "rows_per_shard", "num_assistant_tokens"])
def test_counts_are_positive(name: str) -> None:
    with pytest.raises(FastDraftError, match=rf"generate\.{name}: must be at least 1, got 0"):
        build_recipe({"generate": {name: 0}})


def test_every_process_has_its_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastdraft_hf.stages.target_engine import _own_device

    assert _own_device("cuda") == "cuda"
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert (_own_device("cuda"), _own_device("cpu")) == ("cuda:3", "cpu")


def test_the_servers_model_is_the_recipes_target(tmp_path: Path, tiny_target_folder: Path) -> None:
    run = make_run(tmp_path / "run", tiny_target_folder, server="http://127.0.0.1:1")
    tokenizer = AutoTokenizer.from_pretrained(tiny_target_folder)
    with VLLMServer(models=["another"]) as server:
        run.recipe.generate.server = server.url  # type: ignore[union-attr]
        with pytest.raises(FastDraftError, match="serves another, and none is called target"):
            open_target_engine(run, tokenizer)
        run.recipe.generate.server_model = "another"  # type: ignore[union-attr]
        assert isinstance(open_target_engine(run, tokenizer), VLLMEngine)
