"""What a recipe's evaluate and bench name is kept out of everything that recipe trains on."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from fastdraft_hf import FastDraftError
from fastdraft_hf.data.engines import Request
from fastdraft_hf.data.sources import Source
from fastdraft_hf.data.task_sets import TASK_NAMES, Decontaminator, TaskSet
from fastdraft_hf.recipe import build_recipe
from fastdraft_hf.stages import evaluate, generate, generated_sets, train
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
    """A recipe whose two measuring stages read a local file each."""
    for name, secret in SECRETS.items():
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"ask": secret}) + "\n")
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
            "bench": {"tasks": {"c": {"dataset": str(tmp_path / "bench.jsonl"), "column": "ask"}}},
        }
    )
    made = Run(recipe, tmp_path / "run", Target(tiny_target_folder, "tiny"))
    made.folder.mkdir()
    return made


@pytest.fixture
def text_read(
    run: Run, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> Callable[[str], tuple[str, dict[str, Any]]]:
    """Return all that a training stage reads, as text, and the summary of its data."""

    def read(name: str) -> tuple[str, dict[str, Any]]:
        stage = run.recipe.training_stages()[name]
        corpus = train.open_rows(run, tmp_path / "data", name, stage, tiny_tokenizer)
        ids = corpus.train["input_ids"]
        return " ".join(map(tiny_tokenizer.decode, ids)), corpus.summary

    return read


@pytest.fixture
def ask(
    run: Run,
    make_engine: Callable[..., Any],
    tiny_tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., tuple[dict[str, Any], list[str]]]:
    """Run stage generate on questions; return its facts and the prompts the target was asked.

    The target answers with the first secret and with open text, in turn.
    """

    def run_stage(*questions: str) -> tuple[dict[str, Any], list[str]]:
        def answer(request: Request) -> list[int]:
            text = [SECRETS["evaluate"], OPEN][request.index % 2]
            ids: list[int] = tiny_tokenizer(text, add_special_tokens=False)["input_ids"]
            return ids

        engine = make_engine(answer)
        monkeypatch.setattr(generate, "_open_engine", lambda *args, **given: engine)
        monkeypatch.setattr(generated_sets, "code_instructions", lambda seed: list(questions))
        facts = generate.run(run, run.stage_folder("generate"))
        return facts, [tiny_tokenizer.decode(request.prompt_ids) for request in engine.asked]

    return run_stage


@pytest.mark.parametrize("name", ["pretrain", "continue"])
def test_corpora_lose_what_evaluate_and_bench_read(
    text_read: Callable[..., Any], name: str
) -> None:
    text, summary = text_read(name)
    assert "assistant and the user ate" in text
    assert "hat sat on" not in text
    assert "ten hens" not in text
    (counts,) = summary["sources"].values()
    assert counts["dropped"] == {"overlaps held-out text": 2}
    assert counts["documents"] == 1
    assert counts["passes"] > 1
    assert set(summary["held_out"]) == {*TASK_NAMES, "mine", "c"}


def test_prompts_and_answers_lose_it_too(
    ask: Callable[..., Any], text_read: Callable[..., Any]
) -> None:
    facts, asked = ask(*SECRETS.values(), OPEN, "and that", "and this", "on that")
    assert len(asked) == 4
    assert not [prompt for prompt in asked if "hat sat on" in prompt or "ten hens" in prompt]
    assert facts["sets"]["code"]["prompts"]["overlaps held-out text"] == 2
    assert set(facts["held_out"]) == {*TASK_NAMES, "mine", "c"}
    text, _ = text_read("align")
    assert "assistant and the user ate" in text
    assert "hat sat on" not in text


def test_a_task_that_cannot_be_read_stops_before_any_work(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generate, "_open_engine", lambda *a, **g: pytest.fail("work started"))
    (tmp_path / "evaluate.jsonl").write_text(json.dumps({"other": "text"}) + "\n")
    with pytest.raises(FastDraftError, match=r"tasks\.mine\.column: .* has no column 'ask'"):
        generate.run(run, tmp_path)


def test_prompts_written_before_a_task_was_named_are_found_in_training(
    run: Run, ask: Callable[..., Any], text_read: Callable[..., Any]
) -> None:
    """A set whose prompts hold the secret, read by pre-training, which sees prompts too."""
    bench, run.recipe.bench.tasks = run.recipe.bench.tasks, ["ifbench"]
    ask("and this", SECRETS["bench"], "on that", OPEN)
    run.recipe.bench.tasks = bench
    run.recipe.training_stages()["pretrain"].sources = [Source(kind="generated", name="code")]
    text, _ = text_read("pretrain")
    assert "assistant and the user ate" in text
    assert "ten hens" not in text
    assert "hat sat on" not in text


def test_a_killed_generate_resumes_with_the_same_prompts_only(
    ask: Callable[..., Any], tmp_path: Path
) -> None:
    first, _ = ask(OPEN)
    assert ask(OPEN)[0] == first
    (tmp_path / "bench.jsonl").write_text(json.dumps({"ask": f"{OPEN} again"}) + "\n")
    with pytest.raises(FastDraftError, match=r"evaluate\.tasks, bench\.tasks or .* changed"):
        ask(OPEN, "and that")


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


def test_one_name_may_be_a_set_of_evaluate_and_another_of_bench(tmp_path: Path) -> None:
    tasks = []
    for name, text in SECRETS.items():
        (tmp_path / name).with_suffix(".txt").write_text(text, encoding="utf-8")
        tasks.append({"mine": TaskSet(dataset=str(tmp_path / f"{name}.txt"))})
    check = Decontaminator.of_task_sets(*tasks)
    assert all(check.overlaps(text) for text in SECRETS.values())
    assert not check.overlaps(OPEN)
    assert len(check.held_out["mine"]) == 2
