"""Logs of requests and answers: their forms, what is held out, and what is left out."""

import gzip
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from fastdraft_hf._errors import FastDraftError
from fastdraft_hf.data.engines import Request
from fastdraft_hf.data.task_sets import Decontaminator, TaskSet, load_task_set
from fastdraft_hf.data.traffic import Exchange, LoggedAnswers, exchange, read_traffic

ASKED = {"messages": [{"role": "user", "content": "Where is the cat?"}], "model": "m"}
SAID = {"role": "assistant", "content": "In the hat."}


def response(message: Any = SAID, reason: str = "stop", model: str = "m") -> dict[str, Any]:
    return {"model": model, "choices": [{"index": 0, "message": message, "finish_reason": reason}]}


def chunk(delta: dict[str, Any], reason: str | None = None, index: int = 0) -> dict[str, Any]:
    return {"model": "m", "choices": [{"index": index, "delta": delta, "finish_reason": reason}]}


CHUNKS = [
    chunk({"role": "assistant", "content": ""}),
    chunk({"content": "In the "}),
    chunk({"content": "another choice"}, index=1),
    chunk({"content": "hat."}),
    chunk({}, "stop"),
    {"model": "m", "choices": [], "usage": {"total_tokens": 9}},
]
EVENTS = "".join(f"data: {json.dumps(one)}\n\n" for one in CHUNKS) + "data: [DONE]\n\n"


@pytest.mark.parametrize(
    "row",
    [
        {"request": ASKED, "response": response()},
        {"request": {"url": "/v1", "body": ASKED}, "response": {"status": 200, "body": response()}},
        {"request": {"body": json.dumps(ASKED)}, "response": json.dumps(response())},
        {**ASKED, "response": response()},
        {**ASKED, "choices": response()["choices"]},
        {"model": "m", "messages": [*ASKED["messages"], SAID]},
        {"request": ASKED, "response": CHUNKS},
        {"request": ASKED, "response": {"body": EVENTS}},
        {
            "request": {
                "messages": [{"role": "user", "content": [{"type": "text", "text": "Where is the "},
                                                          {"type": "text", "text": "cat?"}]}]
            },
            "response": response(),
        },
    ],
)  # fmt: skip
def test_every_form_is_the_same_exchange(row: dict[str, Any]) -> None:
    found = exchange(json.loads(json.dumps(row)))
    assert found == Exchange(ASKED["messages"], SAID, True, "m")


def test_tools_and_their_streamed_calls_are_joined() -> None:
    tools = [{"type": "function", "function": {"name": "find"}}]
    start = {"index": 0, "id": "c", "type": "function", "function": {"name": "find"}}
    parts = [
        chunk({"role": "assistant", "content": None, "tool_calls": [start]}),
        chunk({"tool_calls": [{"index": 0, "function": {"arguments": '{"what": '}}]}),
        chunk({"tool_calls": [{"index": 0, "function": {"arguments": '"cat"}'}}]}),
        chunk({}, "tool_calls"),
    ]
    found = exchange({"request": {**ASKED, "tools": tools}, "response": parts})
    assert isinstance(found, Exchange)
    assert found.tools == tools
    assert isinstance(found.answer, dict)
    (call,) = found.answer["tool_calls"]
    assert call["function"] == {"name": "find", "arguments": {"what": "cat"}}


def test_a_text_completion() -> None:
    answered = {"model": "m", "choices": [{"text": " in the hat", "finish_reason": "length"}]}
    found = exchange({"request": {"prompt": "The cat is"}, "response": answered})
    assert found == Exchange("The cat is", " in the hat", False, "m")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (["a"], "no chat"),
        ({}, "no chat"),
        ({"messages": "hello", "response": response()}, "no chat"),
        ({"messages": [SAID], "response": response()}, "no chat"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}, SAID]}, "no chat"),
        ({"messages": [None], "response": response()}, "no chat"),
        (ASKED, "no answer"),
        ({"request": ASKED, "response": {"error": {"message": "busy"}}}, "no answer"),
        ({"request": ASKED, "response": None}, "no answer"),
        ({"request": ASKED, "response": "data: {"}, "no answer"),
        ({"request": ASKED, "response": response({"content": " "})}, "no answer"),
        ({"request": ASKED, "response": response(None)}, "no answer"),
        ({"request": ASKED, "response": response(reason="content_filter")}, "no answer"),
        ({"request": ASKED, "response": {"choices": [3]}}, "no answer"),
        ({"prompt": "a", "response": response()}, "no answer"),
    ],
)
def test_what_is_no_exchange_has_a_reason(row: Any, reason: str) -> None:
    assert exchange(json.loads(json.dumps(row))) == reason


def log(path: Path, rows: list[Any]) -> str:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.parent.mkdir(exist_ok=True)
    opened: Any = gzip.open if path.suffix == ".gz" else open
    with opened(path, "wt", encoding="utf-8") as file:
        file.write(text)
    return str(path)


def asked(text: str, answer: str = "In the hat.", **given: Any) -> dict[str, Any]:
    return {
        "request": {"messages": [{"role": "user", "content": text}]},
        "response": response({"role": "assistant", "content": answer}, **given),
    }


def test_a_conversation_is_held_out_whole(tmp_path: Path) -> None:
    rows = [asked(f"Where is cat {n}?") for n in range(200)]
    for row in rows[:100]:  # the same conversations go on
        chat = [*row["request"]["messages"], SAID, {"role": "user", "content": "And then?"}]
        system = {"role": "system", "content": "Be brief."}
        rows.append({"request": {"messages": [system, *chat]}, "response": response()})
    log(tmp_path / "logs" / "a.jsonl", rows[:150])
    log(tmp_path / "logs" / "b.jsonl.gz", rows[150:])
    trained, held_out = (
        {one.first for one in read_traffic(str(tmp_path / "logs"), held, Counter())}
        for held in (False, True)
    )
    assert not trained & held_out
    assert len(trained | held_out) == 200
    assert 10 <= len(held_out) <= 35
    task = TaskSet(kind="traffic", dataset=str(tmp_path / "logs"))
    assert {one.text for one in load_task_set("mine", task)} == held_out
    # Prompts of one service share much of their text, so only whole conversations are left out.
    check = Decontaminator.of_task_sets({"mine": task})
    assert check.held_out["mine"]
    assert not check.overlaps(next(iter(held_out)))


def test_secrets_patterns_and_other_models_are_left_out(tmp_path: Path) -> None:
    rows = [
        asked("Where is the cat?"),
        asked("Use my key sk-proj-a1b2c3d4e5f6g7h8i9"),
        asked("Call 030 1234567 now"),
        asked("Where is the dog?", model="other"),
    ]
    counts = Counter[str]()
    found = [
        one.first
        for held in (False, True)
        for one in read_traffic(
            log(tmp_path / "log.jsonl", rows), held, counts, model="m", drop_patterns=[r"\d{7}"]
        )
    ]
    assert found == ["Where is the cat?"]
    assert counts == {"secret": 1, "pattern": 1, "another model": 1}


def test_several_models_have_to_be_told_apart(tmp_path: Path) -> None:
    path = log(tmp_path / "log.jsonl", [asked("a"), asked("b", model="other")])
    with pytest.raises(FastDraftError, match=r"model: .* has answers of m and of other; name the"):
        list(read_traffic(path, False, Counter()))


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, "dataset: no file matches"), ("{", r"log\.jsonl:1: not valid JSON")],
)
def test_a_file_that_is_no_log(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "log.jsonl"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    with pytest.raises(FastDraftError, match=message):
        list(read_traffic(str(path), False, Counter()))
    with pytest.raises(FastDraftError, match=message):
        load_task_set("mine", TaskSet(kind="traffic", dataset=str(path)))


def test_answers_are_token_ids_of_the_template(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    ends = {int(tiny_tokenizer.eos_token_id)}
    chat = [{"role": "user", "content": "the cat"}]
    for ended in (True, False):
        one = Exchange(chat, {"role": "assistant", "content": "in the hat"}, ended)
        prompt, answer = one.ids(tiny_tokenizer)
        whole = tiny_tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, return_dict=False
        )
        assert list(prompt) == whole
        engine = LoggedAnswers({prompt: (answer, one.ended)}, ends)
        (found,) = engine.generate([Request(0, prompt, 1.0, 0, 64, "s")], lambda new: None)
        assert found.finish_reason == ("stop" if ended else "length")
        text = list(found.ids[:-1] if ended else found.ids)
        assert tiny_tokenizer.decode(text) == "in the hat"
        (cut,) = engine.generate([Request(0, prompt, 1.0, 0, 2, "s")], lambda new: None)
        assert (cut.ids, cut.finish_reason) == (found.ids[:2], "length")


def test_a_template_that_rewrites_its_turns(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    one = Exchange([{"role": "user", "content": "the cat"}], {"role": "assistant", "content": "in"})
    before = tiny_tokenizer.chat_template
    try:
        tiny_tokenizer.chat_template = "{{ messages | length }}"
        with pytest.raises(FastDraftError, match="writes another text before an answer"):
            one.ids(tiny_tokenizer)
        tiny_tokenizer.chat_template = "{{ raise_exception('never') }}"
        with pytest.raises(FastDraftError, match=r"the chat template refuses it .*never"):
            one.ids(tiny_tokenizer)
    finally:
        tiny_tokenizer.chat_template = before


def test_damaged_rows_are_counted_and_stop_nothing() -> None:
    rng = random.Random(0)
    tool = {"index": 0, "function": {"name": "find", "arguments": "{}"}}
    rows = [
        {"request": {**ASKED, "tools": [1]}, "response": [*CHUNKS, chunk({"tool_calls": [tool]})]},
        {"messages": [*ASKED["messages"], {**SAID, "tool_calls": [tool]}]},
        {"request": {"body": {"prompt": "a"}}, "response": {"choices": [{"text": "b"}]}},
    ]
    other: list[Any] = [None, 0, True, "", "data: 1", "{", [], [[]], {}, {"content": 3}]

    def damaged(value: Any) -> Any:
        if rng.random() < 0.06:
            return rng.choice(other)
        if isinstance(value, dict):
            return {key: damaged(one) for key, one in value.items()}
        return [damaged(one) for one in value] if isinstance(value, list) else value

    found = Counter(type(exchange(damaged(json.loads(json.dumps(row))))) for row in rows * 1500)
    assert found[Exchange] > 100
    assert found[str] > 100
