"""Stages that need no training: what they refuse, and what they leave out."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

from fastdraft_hf import FastDraftError
from fastdraft_hf.eval.prompts import EvaluationPrompt
from fastdraft_hf.export import openvino
from fastdraft_hf.hub.card import best_of_paths
from fastdraft_hf.recipe import build_recipe
from fastdraft_hf.stages import bench, design, export
from fastdraft_hf.stages.runner import Run
from fastdraft_hf.target.resolve import Target


@pytest.fixture
def make_run(tmp_path: Path, tiny_target_folder: Path) -> Callable[..., Run]:
    def make(*overrides: str) -> Run:
        run = Run(build_recipe({}, overrides), tmp_path / "run", Target(tiny_target_folder, "tiny"))
        (tmp_path / "out").mkdir()
        return run

    return make


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """The folder that a stage works in; `make_run` creates it."""
    return tmp_path / "out"


def test_a_given_draft_is_taken_over(
    make_run: Callable[..., Run],
    save_draft: Callable[..., Path],
    tiny_tokenizer: PreTrainedTokenizerFast,
    out: Path,
) -> None:
    given = save_draft("given")
    facts = design.run(make_run(f"design.draft={given}"), out)
    draft = AutoModelForCausalLM.from_pretrained(given)
    assert facts["draft_parameters"] == draft.num_parameters()
    loaded = AutoModelForCausalLM.from_pretrained(out).state_dict()
    assert all((loaded[name] == value).all() for name, value in draft.state_dict().items())
    assert AutoTokenizer.from_pretrained(out).get_vocab() == tiny_tokenizer.get_vocab()


def test_a_given_draft_that_does_not_fit_is_refused(
    make_run: Callable[..., Run], tmp_path: Path, out: Path
) -> None:
    run = make_run(f"design.draft={tmp_path / 'given'}")
    with pytest.raises(FastDraftError, match=r"design\.draft: .* holds no config\.json"):
        design.run(run, out)


def test_an_export_made_by_a_killed_run_is_kept(
    make_run: Callable[..., Run], out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []

    def fake(model: Path, output: Path, weight_format: str, record: Path | None = None) -> None:
        output.mkdir()
        (output / "openvino_model.bin").write_bytes(b"x" * len(weight_format))
        made.append(weight_format)

    monkeypatch.setattr(export, "openvino_obstacle", lambda model: None)
    monkeypatch.setattr(export.parity, "checked_export", fake)
    monkeypatch.setattr(Run, "latest_model", lambda self, before=None: tmp_path)
    run = make_run("export.openvino=[int8, fp16]", "export.acceptance_texts=0")
    fake(tmp_path, out / "openvino-int8", "int8")
    made.clear()
    facts = export.run(run, out)
    assert made == ["fp16"]
    assert facts == {"openvino": ["int8", "fp16"], "weight_bytes": {"int8": 4, "fp16": 4}}


def test_a_format_that_was_not_exported_is_named(make_run: Callable[..., Run]) -> None:
    with pytest.raises(FastDraftError, match=r"bench\.weight_format: fp16 is not among export"):
        make_run("bench.weight_format=fp16")
    run = make_run("bench.weight_format=fp16", "export.openvino=[]")
    with pytest.raises(FastDraftError, match=r"bench\.weight_format: fp16 was not exported; add"):
        bench._models(run, ["ours-openvino"], [])


def test_every_path_is_timed_and_a_killed_bench_resumes(
    make_run: Callable[..., Run],
    save_draft: Callable[..., Path],
    out: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    prompts = [EvaluationPrompt("humaneval", f"H/{n}", (40, 41, 42, 40, 41)) for n in range(2)]
    monkeypatch.setattr(bench, "draw_prompts", lambda *given: prompts)
    monkeypatch.setattr(Run, "latest_model", lambda self, before=None: tmp_path / "own")
    save_draft("own")
    run = make_run(
        "bench.paths=[transformers, ours, prompt-lookup, ours]",
        "bench.tasks=[humaneval]",
        "bench.num_assistant_tokens=[2]",
        "bench.max_new_tokens=6",
    )
    facts = bench.run(run, out)
    names = ["transformers", "ours", "prompt-lookup"]
    assert (facts["cut"], list(facts)[1:]) == ([""], names)
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert list(results["paths"]) == names
    for found in results["paths"].values():
        assert found["answers_differing"] == 0
        assert found["overall"]["alone_first_token_seconds"] > 0
    records = out / "records.jsonl"
    lines = records.read_text(encoding="utf-8").splitlines(keepends=True)
    assert len(lines) == len(prompts) * (len(names) + 2)  # alone, and our loop without a draft
    records.write_text("".join(lines[:5]) + lines[5][:20], encoding="utf-8")
    bench.run(run, out)
    again = records.read_text(encoding="utf-8").splitlines(keepends=True)
    assert again[:5] == lines[:5]
    assert len(again) == len(lines)
    assert best_of_paths(results, ("transformers", "ours")) == 2


def test_without_openvino_it_is_neither_exported_nor_timed(
    make_run: Callable[..., Run],
    out: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(openvino, "openvino_available", lambda: False)
    monkeypatch.setattr(Run, "latest_model", lambda self, before=None: out)
    run = make_run("bench.paths=[openvino, ours, openvino-prompt-lookup, ours-openvino, ours]")
    with caplog.at_level("WARNING", logger="fastdraft_hf"):
        assert bench._available(run) == ["ours"]
        assert export.run(run, out)["openvino"] == []
    assert "path openvino-prompt-lookup is left out" in caplog.text
    assert "no OpenVINO folder is made" in caplog.text
    assert list(out.iterdir()) == []
