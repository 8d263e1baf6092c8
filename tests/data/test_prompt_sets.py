"""Prompts of any dataset, read by the real `datasets`."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pytest

from fastdraft_hf._errors import FastDraftError
from fastdraft_hf.data.config import GeneratedSet
from fastdraft_hf.data.prompts import conversation, conversations

ROWS = [{"question": f"Why is {n} a number?", "number": n, "more": f"It is {n}."} for n in range(9)]
ROLES = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
SHARES = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]


def jsonl(folder: Path, rows: list[dict[str, Any]], name: str = "rows.jsonl") -> str:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def of(dataset: str, **settings: Any) -> GeneratedSet:
    return GeneratedSet(kind="dataset", dataset=dataset, **settings)


def texts(wanted: GeneratedSet, seed: int = 0) -> list[str]:
    return [turns[-1][1] for turns in conversations(wanted, seed, Counter())]


@pytest.fixture(params=["jsonl", "json", "parquet", "csv", "saved", "saved splits", "folder"])
def stored(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The same rows in every form that is read."""
    rows = datasets.Dataset.from_list(ROWS)
    path = tmp_path / f"rows.{request.param}"
    if request.param == "jsonl":
        return jsonl(tmp_path, ROWS)
    if request.param == "json":
        path.write_text(json.dumps(ROWS))
    elif request.param == "parquet":
        rows.to_parquet(str(path))
    elif request.param == "csv":
        rows.to_csv(str(path))
    elif request.param == "saved":
        rows.save_to_disk(str(path))
    elif request.param == "saved splits":
        datasets.DatasetDict({"train": rows}).save_to_disk(str(path))
    else:
        path.mkdir()
        rows.to_parquet(str(path / "part-0.parquet"))
    return str(path)


def test_every_row_once_in_the_seeds_order(stored: str) -> None:
    prompts = of(stored)
    first = texts(prompts, 1)
    assert sorted(first) == [row["question"] for row in ROWS]
    assert texts(prompts, 1) == first
    assert texts(prompts, 2) != first


def test_context_goes_after_the_prompt(tmp_path: Path) -> None:
    rows = [
        {"instruction": "Sum up.", "input": "It rained.", "note": "Briefly."},
        {"instruction": "Hello", "input": "", "note": None},
    ]
    found = texts(of(jsonl(tmp_path, rows), context_columns=["input", "note"]))
    assert sorted(found) == ["Hello", "Sum up.\n\nIt rained.\n\nBriefly."]


@pytest.mark.parametrize(("column", "turns"), [("messages", ROLES), ("conversations", SHARES)])
def test_chats_in_both_forms(tmp_path: Path, column: str, turns: list[dict[str, str]]) -> None:
    speaker, words = turns[0]
    again = {speaker: turns[0][speaker], words: "And then?"}
    system = {speaker: "system", words: "Be brief."}
    rows = [
        {"id": 1, column: turns},
        {"id": 2, column: [system, *turns, again, turns[1]]},
        {"id": 3, column: [turns[1]]},
        {"id": 4, column: [{speaker: "narrator", words: "Once"}]},
        {"id": 5, column: []},
        {"id": 6, column: [{speaker: turns[0][speaker], words: "  "}]},
    ]
    counts: Counter[str] = Counter()
    found = set(conversations(of(jsonl(tmp_path, rows)), 0, counts))
    assert found == {
        (("user", "Hi"),),
        (("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello"), ("user", "And then?")),
    }
    assert counts == {"no user turn": 1, "no chat": 1, "empty": 2}


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        ("  Hi ", (("user", "Hi"),)),
        ("", "empty"),
        (None, "empty"),
        (7, "no chat"),
        ([7], "no chat"),
        ([{"role": "user"}], "no chat"),
        ([{"role": "user", "content": "Hi", "from": None, "value": None}], (("user", "Hi"),)),
        (
            [
                {
                    "role": "user",
                    "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}],
                }
            ],
            (("user", "Hi"),),
        ),
        ([{"role": "user", "content": [{"type": "image", "url": "x"}]}], "no chat"),
        ([{"role": "assistant", "content": "Hello"}], "no user turn"),
    ],
)
def test_cells(value: Any, wanted: Any) -> None:
    assert conversation(value) == wanted


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"context_columns": ["inputs"]},
            "context_columns: .* has no column 'inputs'; it has: qu",
        ),
        ({"split": "tset"}, "cannot read"),
    ],
)
def test_bad_settings_are_named(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    path = tmp_path / "saved"
    datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}).save_to_disk(str(path))
    with pytest.raises(FastDraftError, match=message):
        texts(of(str(path), **settings))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("empty.jsonl", "", "empty.jsonl"),
        ("bad.jsonl", "{no json\n", "cannot read .*bad.jsonl .*; check the file"),
    ],
)
def test_unreadable_files(tmp_path: Path, name: str, text: str, message: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(FastDraftError, match=message):
        texts(of(str(path)))


def test_a_dataset_on_the_hub_out_of_reach() -> None:
    with pytest.raises(FastDraftError, match=r"cannot read no/such-set .* to a local copy"):
        texts(of("no/such-set"))
