"""What a recipe's evaluate and bench name is kept out of everything that recipe trains on."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from fastdraft_hf import FastDraftError
from fastdraft_hf.data.decontaminate import Decontaminator
from fastdraft_hf.data.engines import Completion, Request
from fastdraft_hf.data.sources import Source
from fastdraft_hf.data.task_sets import TaskSet
from fastdraft_hf.recipe import build_recipe
from fastdraft_hf.stages import evaluate, generate, train
from fastdraft_hf.stages.runner import Run
from fastdraft_hf.target.resolve import Target

# Thirteen words and more each, and nothing of them in HumanEval or IFBench.
SECRETS = {
    "evaluate": "the cat sat on that hat then the hat sat on that cat in the inn",
    "bench": "a hen met an ant at ten then ten hens met ten ants at the tenth inn",
}
OPEN = "then the assistant and the user ate in the hat that the cat had on that night"


@pytest.fixture
def run(tmp_path: Path, tiny_target_folder: Path) -> Run:
    """A recipe whose two measuring stages read a local file each, one of them by a chat."""
    chat = [{"role": "user", "content": SECRETS["bench"]}]
    (tmp_path / "evaluate.jsonl").write_text(json.dumps({"ask": SECRETS["evaluate"]}) + "\n")
    (tmp_path / "bench.jsonl").write_text(json.dumps({"messages": chat}) + "\n")
    corpus = tmp_path / "corpus.jsonl"
    lines = [*SECRETS.values(), OPEN]
    corpus.write_text("".join(json.dumps({"text": f"So {t}."}) + "\n" for t in lines))
    source = {"sources": [{"kind": "files", "name": str(corpus)}], "max_length": 16}
    source |= {"max_train_tokens": 256, "eval_rows": 0}
    recipe = build_recipe(
        {
            "device": "cpu",
            "generate": {"engine": "transformers", "sets": {"code": {"kind": "code", "rows": 8}}},
            "pretrain": source,
            "continue": source,
            "align": {"sources": [{"name": "code"}]},
            "evaluate": {
                "tasks": {
                    "mine": {"dataset": str(tmp_path / "evaluate.jsonl"), "column": "ask"},
                    "humaneval": None,
                }
            },
            "bench": {
                "tasks": {"c": {"dataset": str(tmp_path / "bench.jsonl"), "column": "messages"}}
            },
        }
    )
    made = Run(recipe, tmp_path / "run", Target(tiny_target_folder, "tiny"))
    made.folder.mkdir()
    return made


class Parrot:
    """A target that answers every prompt with the first secret, or with open text."""

    name = "parrot"

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        self.asked: list[str] = []

    def generate(
        self, requests: Iterable[Request], on_tokens: Callable[[int], None]
    ) -> Iterator[Completion]:
        for request in requests:
            self.asked.append(self.tokenizer.decode(request.prompt_ids))
            text = [SECRETS["evaluate"], OPEN][request.index % 2]
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
            yield Completion(request, tuple(ids), "length")


def text_of(rows: Any, tokenizer: PreTrainedTokenizerFast) -> str:
    return " ".join(tokenizer.decode(ids) for ids in rows["input_ids"])


@pytest.mark.parametrize("name", ["pretrain", "continue"])
def test_corpora_lose_what_evaluate_and_bench_read(
    run: Run, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path, name: str
) -> None:
    stage = run.recipe.training_stages()[name]
    rows, summary = train.open_rows(run, tmp_path / "data", name, stage, tiny_tokenizer)
    text = text_of(rows["train_dataset"], tiny_tokenizer)
    assert "assistant and the user ate" in text
    assert "hat sat on" not in text
    assert "ten hens" not in text
    (counts,) = summary["sources"].values()
    assert counts["dropped"] == {"overlaps held-out text": 2}
    assert counts["documents"] == 1
    assert counts["passes"] > 1
    assert set(summary["held_out"]) == {"humaneval", "ifbench", "mine", "c"}


def test_prompts_and_answers_lose_it_too(
    run: Run,
    tiny_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = Parrot(tiny_tokenizer)
    monkeypatch.setattr(generate, "open_target_engine", lambda *args, **given: engine)
    questions = [*SECRETS.values(), OPEN, "and that", "and this", "on that"]
    monkeypatch.setattr(generate, "code_instructions", lambda seed: questions)
    facts = generate.run(run, run.stage_folder("generate"))
    assert len(engine.asked) == 4
    assert not [asked for asked in engine.asked if "hat sat on" in asked or "ten hens" in asked]
    assert facts["sets"]["code"]["prompts"]["overlaps held-out text"] == 2
    assert set(facts["held_out"]) == {"humaneval", "ifbench", "mine", "c"}

    stage = run.recipe.training_stages()["align"]
    rows, _ = train.open_rows(run, tmp_path / "data", "align", stage, tiny_tokenizer)
    text = text_of(rows["train_dataset"], tiny_tokenizer)
    assert "assistant and the user ate" in text
    assert "hat sat on" not in text


def test_a_task_that_cannot_be_read_stops_before_any_work(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        generate, "open_target_engine", lambda *a, **g: pytest.fail("work was begun")
    )
    (tmp_path / "evaluate.jsonl").write_text(json.dumps({"other": "text"}) + "\n")
    with pytest.raises(FastDraftError, match=r"tasks\.mine\.column: .* has no column 'ask'"):
        generate.run(run, tmp_path)


def test_prompts_written_before_a_task_was_named_are_found_in_training(
    run: Run,
    tiny_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A set whose prompts hold the secret, read by pre-training, which sees prompts too."""
    monkeypatch.setattr(
        generate, "open_target_engine", lambda *args, **given: Parrot(tiny_tokenizer)
    )
    questions = ["and this", SECRETS["bench"], "on that", OPEN]
    monkeypatch.setattr(generate, "code_instructions", lambda seed: questions)
    bench, run.recipe.bench.tasks = run.recipe.bench.tasks, ["ifbench"]
    generate.run(run, run.stage_folder("generate"))
    run.recipe.bench.tasks = bench
    stage = run.recipe.training_stages()["pretrain"]
    stage.sources = [Source(kind="generated", name="code")]
    rows, _ = train.open_rows(run, tmp_path / "data", "pretrain", stage, tiny_tokenizer)
    text = text_of(rows["train_dataset"], tiny_tokenizer)
    assert "assistant and the user ate" in text
    assert "ten hens" not in text
    assert "hat sat on" not in text


def test_a_killed_generate_goes_on_with_the_same_tasks_only(
    run: Run, tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        generate, "open_target_engine", lambda *args, **given: Parrot(tiny_tokenizer)
    )
    monkeypatch.setattr(generate, "code_instructions", lambda seed: [OPEN])
    folder = run.stage_folder("generate")
    first = generate.run(run, folder)
    assert generate.run(run, folder) == first
    run.recipe.bench.tasks = ["humaneval"]
    with pytest.raises(
        FastDraftError, match=r"evaluate\.tasks, bench\.tasks or their text changed"
    ):
        generate.run(run, folder)


def record(run: Run, stage: str, facts: dict[str, Any]) -> None:
    folder = run.stage_folder(stage)
    folder.mkdir()
    (folder / "provenance.json").write_text(json.dumps({"facts": facts}))


def test_evaluate_knows_what_training_did_not_leave_out(run: Run, tmp_path: Path) -> None:
    assert evaluate.not_held_out(run) == []  # nothing was trained here
    left_out = Decontaminator.of_task_sets(run.recipe.evaluate.tasks).held_out
    record(run, "pretrain", {"data": {"sources": {}, "held_out": left_out}})
    record(run, "align", {"data": {"sources": {}, "held_out": left_out}})
    assert evaluate.not_held_out(run) == []
    # The set has changed since, or a task was named after training.
    (tmp_path / "evaluate.jsonl").write_text(json.dumps({"ask": OPEN}) + "\n")
    assert evaluate.not_held_out(run) == ["mine"]


def test_a_run_made_before_tasks_were_named_left_out_the_packaged_sets(run: Run) -> None:
    record(run, "align", {"data": {"sources": {}}})
    assert evaluate.not_held_out(run) == ["mine"]


def test_one_name_may_be_two_sets(tmp_path: Path) -> None:
    """Of evaluate and bench: both are left out."""
    tasks = []
    for name, text in SECRETS.items():
        path = tmp_path / f"{name}.txt"
        path.write_text(text, encoding="utf-8")
        tasks.append({"mine": TaskSet(dataset=str(path))})
    check = Decontaminator.of_task_sets(*tasks)
    assert all(check.overlaps(text) for text in SECRETS.values())
    assert not check.overlaps(OPEN)
    assert len(check.held_out["mine"]) == 2
    assert (
        Decontaminator.of_task_sets(tasks[0], tasks[0]).held_out["mine"]
        == check.held_out["mine"][:1]
    )
