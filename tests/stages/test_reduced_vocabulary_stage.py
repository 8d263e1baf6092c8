"""Stage reduced_vocabulary: the reduced draft is what later stages export, time and measure."""

import json
import logging
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from fastdraft_hf import FastDraftError
from fastdraft_hf._atomic import write_json
from fastdraft_hf.cli import main as cli
from fastdraft_hf.data.engines import Request
from fastdraft_hf.data.filters import write_filters
from fastdraft_hf.data.parts import write_rows
from fastdraft_hf.draft.reduced_vocabulary import (
    FILE,
    load_draft,
    read_reduced_vocabulary,
    write_reduced_vocabulary,
)
from fastdraft_hf.eval.prompts import EvaluationPrompt
from fastdraft_hf.recipe import build_recipe
from fastdraft_hf.stages import bench, export, reduced_vocabulary
from fastdraft_hf.stages.reduced_vocabulary import best_size, reduce_draft
from fastdraft_hf.stages.runner import Run, execute
from fastdraft_hf.target.resolve import Target

# The target generates few of its 288 tokens, and one that only held-out rows have.
WORDS, RARE = range(100, 140), 287


@pytest.fixture
def make_run(
    tmp_path: Path, tiny_target_folder: Path, make_engine: Callable[..., Any]
) -> Callable[..., Run]:
    """A run whose target has generated 20 rows of random words."""

    def answer(request: Request) -> list[int]:
        ids = random.Random(request.index).choices(WORDS, k=20)
        return ids if request.index % 5 else [RARE, *ids[1:]]  # every fifth row is held out

    def make(**data: Any) -> Run:
        folder = tmp_path / "run" / "generate"
        if not folder.exists():
            requests = [Request(n, (1, 40 + n), 1.0, n, 20, "t") for n in range(20)]
            write_rows(make_engine(answer), requests, folder / "chat")
            write_filters(folder / "chat", None)
            write_json(folder / "provenance.json", {"id": "generate-1"})
        recipe = {
            "device": "cpu",
            "design": {"hidden_size": 16, "num_hidden_layers": 1, "params": "1k"},
            "generate": {"sets": {"chat": {"rows": 20}}},
            "reduced_vocabulary": {"draft_vocab_size": 60},
            **data,
        }
        return Run(build_recipe(recipe), tmp_path / "run", Target(tiny_target_folder, "tiny"))

    return make


def test_the_trained_draft_is_reduced(
    make_run: Callable[..., Run], caplog: pytest.LogCaptureFixture
) -> None:
    run = make_run()
    with caplog.at_level(logging.INFO):
        execute(run, ["design", "reduced_vocabulary"])
    assert "reduced_vocabulary: 60 of 288 tokens cover 95.00%" in caplog.text
    folder = run.stage_folder("reduced_vocabulary")
    head = read_reduced_vocabulary(folder)
    assert head is not None
    assert {*WORDS, 2} <= set(head)  # 2 ends an answer
    assert RARE not in head
    assert load_draft(folder).get_output_embeddings().weight.shape[0] == 60
    facts = json.loads((folder / "provenance.json").read_text(encoding="utf-8"))["facts"]
    assert facts["coverage"] == 0.95
    # Later stages read it, and what it was made from stays.
    assert run.latest_model() == folder
    assert not (run.stage_folder("design") / FILE).exists()
    whole = AutoModelForCausalLM.from_pretrained(run.stage_folder("design")).state_dict()
    copied = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert all(torch.equal(whole[name], copied[name]) for name in whole)
    made = (folder / "provenance.json").read_bytes()
    execute(make_run(), ["design", "reduced_vocabulary"])
    assert (folder / "provenance.json").read_bytes() == made


def test_the_size_follows_from_right_guesses_and_from_what_is_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each token that is guessed as often as the next is worth its bytes, or none is."""
    monkeypatch.setattr(reduced_vocabulary, "LEAST", 64)
    target = LlamaConfig(vocab_size=640, hidden_size=64, intermediate_size=64, num_hidden_layers=40)
    draft = LlamaConfig(vocab_size=640, hidden_size=64, intermediate_size=64, num_hidden_layers=1)
    few = [0.8 / 128] * 128 + [0.0] * 512
    assert best_size(few, target, draft) == 128
    assert best_size([0.9 / 640] * 640, target, draft) == 640
    wide = LlamaConfig(**{**draft.to_dict(), "hidden_size": 512})  # reads as much as the target
    rare = [0.8 / 128] * 128 + [0.05 / 512] * 512
    assert best_size(rare, target, wide) == 128
    assert best_size([0.0] * 640, target, draft) == 64
    monkeypatch.undo()
    assert best_size(few, target, draft) == 640  # so small a vocabulary is not reduced


@pytest.mark.parametrize("least", [64, reduced_vocabulary.LEAST])
def test_the_size_of_a_run_is_found(
    make_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch, least: int
) -> None:
    monkeypatch.setattr(reduced_vocabulary, "LEAST", least)
    run = make_run(reduced_vocabulary={})
    execute(run, ["design", "reduced_vocabulary"])
    folder = run.stage_folder("reduced_vocabulary")
    facts = json.loads((folder / "provenance.json").read_text(encoding="utf-8"))["facts"]
    head = read_reduced_vocabulary(folder)
    assert facts["draft_vocab_size"] == (288 if head is None else len(head))
    assert (head is None) is (least > 288)  # a vocabulary of 288 tokens
    assert load_draft(folder).get_output_embeddings().weight.shape[0] == facts["draft_vocab_size"]


@pytest.mark.parametrize("size", [1, 288])
def test_an_impossible_size_is_refused_before_any_work(
    tmp_path: Path, tiny_target_folder: Path, capsys: pytest.CaptureFixture[str], size: int
) -> None:
    settings = {
        "target": tiny_target_folder,
        "output_dir": tmp_path / "run",
        "generate.sets.chat.rows": 20,
        "reduced_vocabulary.draft_vocab_size": size,
    }
    assert cli.main(["run", *(f"{key}={value}" for key, value in settings.items())]) == 2
    said = f"reduced_vocabulary.draft_vocab_size: {size} must be more than the 1 end tokens"
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("sets", "words"),
    [([], "the generated sets hold no completions"), ([Path("nowhere")], "nowhere")],
)
def test_without_completions_nothing_is_written(
    sets: list[Path], words: str, tiny_target_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(FastDraftError, match=words):
        reduce_draft(tiny_target_folder, sets, 50, tmp_path / "t", target=tiny_target_folder)
    assert list(tmp_path.iterdir()) == []


def test_it_is_what_is_exported(
    make_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[tuple[str, str]] = []

    def fake(model: Path, output: Path, weight_format: str, record: Path) -> None:
        output.mkdir()
        (output / "openvino_model.bin").write_bytes(b"x")
        made.append((model.name, output.name))

    monkeypatch.setattr(export, "openvino_obstacle", lambda model: None)
    monkeypatch.setattr(export.parity, "checked_export", fake)
    section = {"openvino": ["int8", "int4"], "acceptance_texts": 0}
    run = make_run(export=section)
    execute(run, ["design", "reduced_vocabulary", "export"])
    assert made == [
        ("reduced", "openvino-int8"),
        ("reduced", "openvino-int4"),
    ]


def test_bench_times_it_and_its_full_head_in_stock_transformers(
    make_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [EvaluationPrompt("humaneval", "H/0", (40, 41, 42, 40, 41))]
    monkeypatch.setattr(bench, "draw_prompts", lambda *given: prompts)
    section = {"paths": ["transformers", "ours"], "tasks": ["humaneval"]}
    section |= {"num_assistant_tokens": [2], "max_new_tokens": 6}
    run = make_run(bench=section, export={"openvino": []})
    execute(run, ["design", "reduced_vocabulary", "export", "bench"])
    path = run.stage_folder("bench") / "results.json"
    results = json.loads(path.read_text(encoding="utf-8"))
    assert list(results["paths"]) == ["transformers", "ours"]
    assert all(found["answers_differing"] == 0 for found in results["paths"].values())


@pytest.mark.parametrize("path", ["ours", "transformers"])
def test_evaluate_uses_the_head_of_a_given_draft_as_it_is(
    path: str,
    tmp_path: Path,
    tiny_target_folder: Path,
    save_draft: Callable[..., Path],
    tiny_model: Callable[..., LlamaForCausalLM],
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    """The draft is the target itself, with a head of only the tokens it would not generate."""
    prompt = "the cat and the hat"
    ids = torch.tensor([tiny_tokenizer(prompt)["input_ids"]])
    written = tiny_model().generate(ids, max_new_tokens=8, do_sample=False)[0].tolist()
    given = save_draft("given", seed=0, num_hidden_layers=2)
    head = [t for t in range(288) if t not in written]
    write_reduced_vocabulary(given, head)
    (tmp_path / "asked.txt").write_text(prompt, encoding="utf-8")
    data = {
        "device": "cpu",
        "design": {"draft": str(given)},
        "evaluate": {
            "tasks": {"mine": {"dataset": str(tmp_path / "asked.txt")}},
            "prompts_per_task": 1,
            "max_new_tokens": 8,
            "path": path,
        },
    }
    run = Run(build_recipe(data), tmp_path / "run", Target(tiny_target_folder, "tiny"))
    execute(run, ["design", "evaluate"])
    assert read_reduced_vocabulary(run.stage_folder("design")) == head
    found = json.loads((run.stage_folder("evaluate") / "results.json").read_text(encoding="utf-8"))
    assert found["draft_parameters"] == tiny_model().num_parameters()
    rate = found["overall"]["greedy"]["acceptance_rate"][0]
    assert (rate < 0.5) if path == "ours" else (rate == 1.0)


def test_ids_outside_a_given_draft_are_refused(
    tmp_path: Path, tiny_target_folder: Path, save_draft: Callable[..., Path]
) -> None:
    given = save_draft("given")
    write_reduced_vocabulary(given, [1, 288])
    data = {"design": {"draft": str(given)}}
    run = Run(build_recipe(data), tmp_path / "run", Target(tiny_target_folder, "tiny"))
    with pytest.raises(FastDraftError, match="token 288 is not among the draft's 288"):
        execute(run, ["design"])
