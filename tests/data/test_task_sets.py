"""Task sets by name and by column, and the texts that overlap them. The Hub is stood in for."""

import ast
import dataclasses
import json
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from fastdraft_hf import FastDraftError
from fastdraft_hf.data import task_sets
from fastdraft_hf.data.task_sets import (
    HUB_SETS,
    NGRAM,
    ROWS,
    Decontaminator,
    TaskSet,
    check_tasks,
    digest,
    load_task_set,
)
from fastdraft_hf.eval.prompts import draw_prompts

QUESTIONS = [f"Question number {n}: what is {n} and {n}?" for n in range(8)]
ROWS_OF_IT = [{"id": f"q{n}", "ask": text, "topic": "sums"} for n, text in enumerate(QUESTIONS)]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return path


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    return write(tmp_path / "questions.jsonl", ROWS_OF_IT)


def test_humaneval() -> None:
    prompts = load_task_set("humaneval")
    assert len(prompts) == len({p.key for p in prompts}) == 164
    assert prompts[0].key == "HumanEval/0"
    for prompt in prompts:
        assert prompt.text.rstrip() in prompt.instruction
        ast.parse(prompt.text + prompt.also)  # signature, solution and test belong together


def test_ifbench() -> None:
    prompts = load_task_set("ifbench")
    assert len(prompts) == 294
    assert all(p.text == p.instruction and p.text.strip() for p in prompts)


def test_the_manual_has_sections_of_every_length() -> None:
    prompts = load_task_set("manual")
    lengths = sorted(len(prompt.text.split()) for prompt in prompts)
    assert len({prompt.key for prompt in prompts}) == len(prompts) > 60
    assert lengths[5] < 80
    assert lengths[-3] > 4000
    assert all(prompt.text.strip() in prompt.instruction for prompt in prompts)


def test_a_column_is_asked(questions: Path) -> None:
    prompts = load_task_set("mine", TaskSet(dataset=str(questions), column="ask"))
    assert [p.text for p in prompts] == [p.instruction for p in prompts] == QUESTIONS
    assert [p.key for p in prompts] == [str(n) for n in range(8)]


def test_the_template_takes_other_columns_and_words_cut(questions: Path) -> None:
    wanted = TaskSet(
        dataset=str(questions), column="ask", instruction="{topic}: {}\n\n{{literally}}", words=3
    )
    first = load_task_set("mine", wanted)[0]
    assert first.instruction == "sums: Question number 0:\n\n{literally}"
    assert first.text == QUESTIONS[0]  # held out is the whole column, and what else was read
    assert first.also == "sums"


def test_the_first_rows_are_the_task(tmp_path: Path) -> None:
    rows = [{"text": f"prompt {n}"} for n in range(ROWS + 50)]
    path = write(tmp_path / "many.jsonl", rows)
    assert len(load_task_set("mine", TaskSet(dataset=str(path)))) == ROWS
    few = TaskSet(dataset=str(path), rows=3)
    assert [p.text for p in load_task_set("mine", few)] == [f"prompt {n}" for n in range(3)]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[dict[str, Any]]], list[Any]]:
    """Stand in for the Hub: every set holds the given rows; return the calls made."""

    def serve(rows: list[dict[str, Any]]) -> list[Any]:
        calls: list[Any] = []

        def load_dataset(path: str, name: str | None = None, **given: Any) -> Any:
            calls.append((path, name, given))
            return datasets.Dataset.from_list(rows).to_iterable_dataset()

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        monkeypatch.setattr(task_sets, "_read", {})
        return calls

    return serve


@pytest.mark.parametrize("name", HUB_SETS)
def test_a_known_set_is_streamed_from_the_hub_once(
    name: str, hub: Callable[[list[dict[str, Any]]], list[Any]]
) -> None:
    known = HUB_SETS[name]
    columns = {known.column, "context"}
    words = " ".join(f"w{n}" for n in range(50))
    rows = [{str(c): f"{n} {c} {words}" for c in columns} for n in range(4)]
    calls = hub(rows)
    prompts = load_task_set(name)
    assert load_task_set(name, TaskSet()) == prompts
    assert len(calls) == 1
    path, config, given = calls[0]
    assert (path, config) == (known.dataset, known.name)
    assert given == {"split": known.split, "revision": None, "streaming": True}
    assert [p.text for p in prompts] == [row[str(known.column)] for row in rows]
    assert all(p.instruction.startswith(known.instruction.split("{")[0]) for p in prompts)
    if known.words:
        assert "w29" in prompts[0].instruction
        assert "w30" not in prompts[0].instruction


def test_a_copy_of_a_known_set_keeps_its_columns(tmp_path: Path) -> None:
    path = write(tmp_path / "copy.jsonl", [{"article": "long news"}])
    (prompt,) = load_task_set("cnn_dailymail", TaskSet(dataset=str(path)))
    assert (prompt.key, prompt.instruction) == ("0", "Summarize this article:\n\nlong news")


@pytest.mark.parametrize("error", [ConnectionError("no network\nat all"), RuntimeError(), OSError])
def test_a_hub_out_of_reach_is_one_line_that_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, error: Any
) -> None:
    def fail(*args: Any, **given: Any) -> Any:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", fail)
    monkeypatch.setattr(task_sets, "_read", {})
    with pytest.raises(FastDraftError) as caught:
        load_task_set("tinystories")
    text = str(caught.value)
    assert text.startswith("tasks.tinystories: cannot read roneneldan/TinyStories (")
    assert "set dataset to a local copy" in text
    assert "\n" not in text


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"column": "aks"}, "tasks.mine.column: .* has no column 'aks' .did you mean 'ask'"),
        ({"column": "qqqqq"}, "no column 'qqqqq'; it has: id, ask, topic"),
        ({"column": "ask", "instruction": "{} {topc}"}, "tasks.mine.instruction: .*'topic'"),
        ({"column": "ask", "split": "a b"}, "tasks.mine: cannot read .*; check the file"),
    ],
)
def test_a_wrong_setting_is_named(questions: Path, given: dict[str, Any], message: str) -> None:
    with pytest.raises(FastDraftError, match=message):
        load_task_set("mine", TaskSet(dataset=str(questions), **given))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": "  "}, {"text": None}], "tasks.mine.column: 'text' is empty in every row"),
        ([{"text": 3}], "tasks.mine.column: 'text' holds no text in row 0, but int"),
    ],
)
def test_rows_that_are_not_prompts(tmp_path: Path, rows: list[Any], message: str) -> None:
    path = write(tmp_path / "bad.jsonl", rows)
    with pytest.raises(FastDraftError, match=message):
        load_task_set("mine", TaskSet(dataset=str(path)))


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ({}, "tasks: at least one is needed"),
        ([], "tasks: at least one is needed"),
        (["doly"], "no task set 'doly' .did you mean 'dolly'"),
        ({"mine": TaskSet()}, "no task set .mine.; .*, or a name of your own with a dataset"),
        ({"mine": TaskSet(dataset="gone.jsonl")}, "tasks.mine.dataset: no such file or folder: "),
        ({"mine": TaskSet(dataset="./gone")}, "tasks.mine.dataset: no such file or folder: "),
        ({"mine": TaskSet(dataset=__file__)}, r"has an unknown suffix; known: \.jsonl, "),
        ({"a/b": TaskSet(dataset="org/x")}, "tasks: 'a/b' is not a valid name"),
        ({"ifbench": TaskSet(rows=3)}, "tasks.ifbench.rows: ifbench is this package.s own"),
    ],
)
def test_a_task_that_cannot_be_is_refused_before_any_reading(tasks: Any, message: str) -> None:
    with pytest.raises(FastDraftError, match=message):
        check_tasks(tasks)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rows", 0),
        ("words", 0),
        ("instruction", "none"),
        ("instruction", "{"),
        ("instruction", "{} {a.b}"),
        ("instruction", "{} {0}"),
    ],
)
def test_settings_that_cannot_be(field: str, value: Any) -> None:
    with pytest.raises(FastDraftError, match=f"^{field}: "):
        TaskSet(**{field: value})


def test_no_prompt_short_enough(questions: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    wanted = {"mine": TaskSet(dataset=str(questions), column="ask")}
    with pytest.raises(FastDraftError, match="max_prompt_tokens: no prompt of mine is as short as"):
        draw_prompts(tiny_tokenizer, wanted, 2, 3, 0)


TEXT = st.text(st.sampled_from(string.ascii_letters + " {}\n\"',é"), max_size=30)


@given(st.lists(TEXT, min_size=1, max_size=12), st.none() | st.integers(1, 4))
def test_any_text_is_asked_as_it_stands(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], words: int | None
) -> None:
    """Braces in the data are no template, and blank rows are passed over."""
    path = write(tmp_path_factory.mktemp("any") / "t.jsonl", [{"text": t} for t in texts])
    wanted = TaskSet(dataset=str(path), instruction="<{}>", words=words)
    if not any(text.strip() for text in texts):
        with pytest.raises(FastDraftError, match="is empty in every row"):
            load_task_set("mine", wanted)
        return
    prompts = load_task_set("mine", wanted)
    kept = [text for text in texts if text.strip()]
    assert [p.text for p in prompts] == kept
    assert len({p.key for p in prompts}) == len(prompts)
    for prompt, text in zip(prompts, kept, strict=True):
        inner = prompt.instruction.removeprefix("<").removesuffix(">")
        assert inner.split() == text.split()[:words]
    assert digest(prompts) == digest(reversed(prompts))
    assert digest(prompts) != digest([*prompts, dataclasses.replace(prompts[0], text="more")])


WORDS = [f"word{i}" for i in range(40)]


@pytest.fixture(scope="module")
def real() -> Decontaminator:
    return Decontaminator.of_task_sets()


@given(
    start=st.integers(0, 20),
    shared=st.integers(0, 20),
    before=st.lists(st.just("other"), max_size=5),
    separator=st.sampled_from([" ", "\n", ", ", "... "]),
)
def test_thirteen_words_are_too_many(
    start: int, shared: int, before: list[str], separator: str
) -> None:
    check = Decontaminator([" ".join(WORDS)])
    text = separator.join([*before, *WORDS[start : start + shared], "else"]).upper()
    assert check.overlaps(text) == (shared >= NGRAM)


LETTERS = st.lists(st.sampled_from("abc"), max_size=16).map(" ".join)


@given(st.lists(LETTERS, max_size=4), LETTERS)
def test_it_is_what_the_rule_says(held_out: list[str], text: str) -> None:
    """Few words, so that they meet: the rule, written plainly."""

    def shared(other: str) -> bool:
        words = other.split()
        length = min(len(words), NGRAM)
        return length >= 5 and any(
            f" {' '.join(words[i : i + length])} " in f" {text} "
            for i in range(len(words) - length + 1)
        )

    assert Decontaminator(held_out).overlaps(text) == any(map(shared, held_out))


def test_held_out_texts_overlap_themselves(real: Decontaminator) -> None:
    humaneval = load_task_set("humaneval")
    assert all(real.overlaps(prompt.text) for prompt in humaneval)
    assert all(real.overlaps(prompt.instruction) for prompt in humaneval)
    assert all(real.overlaps(prompt.also) for prompt in humaneval)  # solutions and tests
    assert all(real.overlaps(prompt.text) for prompt in load_task_set("ifbench"))
    assert not real.overlaps("The weather was fine and the two of us went to the sea that day.")
