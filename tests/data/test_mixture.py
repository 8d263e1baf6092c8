"""A stage's mixture of shards: shares of tokens, what is held out, what the summary says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastdraft_hf._errors import FastDraftError
from fastdraft_hf.data.mixture import (
    open_mixture,
    plan_mixture,
    summary_lines,
    tokenize_sources,
    wanted_tokens,
    write_mixture,
)
from fastdraft_hf.data.sources import Source

LENGTH = 16
Mix = Callable[..., tuple[Any, list[list[int]], dict[str, Any]]]


def files(tmp_path: Path, name: str, texts: list[str], **changes: Any) -> Source:
    path = tmp_path / name
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts), encoding="utf-8")
    return Source(kind="files", name=str(path), **changes)


def unlike(number: int) -> str:
    """Return a text of about 90 characters that repeats nothing."""
    return " ".join(str((number * 30 + i) * 7919) for i in range(14))


@pytest.fixture
def mix(tmp_path: Path, tiny_tokenizer: Any) -> Mix:
    def make(
        sources: list[Source], blocks: int, eval_blocks: int = 0, seed: int = 0, **changes: Any
    ) -> tuple[Any, list[list[int]], dict[str, Any]]:
        settings: dict[str, Any] = {"overlaps": lambda text: False, "shared": None, **changes}
        shards = tokenize_sources(
            sources,
            tiny_tokenizer,
            own=tmp_path / "stage" / "tokens",
            generated=tmp_path,
            held_out={},
            wanted_tokens=wanted_tokens(sources, blocks, eval_blocks, LENGTH),
            processes=1,
            **settings,
        )
        plan, held_out, summary = plan_mixture(
            sources, shards, blocks=blocks, eval_blocks=eval_blocks, length=LENGTH, seed=seed
        )
        (tmp_path / "stage" / "data").mkdir(parents=True, exist_ok=True)
        write_mixture(tmp_path / "stage" / "data", plan)
        return open_mixture(tmp_path / "stage" / "data"), held_out, summary

    return make


def letters(tokenizer: Any, text: str) -> list[int]:
    return [int(i) for i in tokenizer.convert_tokens_to_ids(list(text))]


def test_weights_are_shares_of_tokens(tmp_path: Path, tiny_tokenizer: Any, mix: Mix) -> None:
    """Whatever the lengths of the documents: a's are twenty times longer."""
    a = files(
        tmp_path, "a.jsonl", ["b" * 200] * 1 + [f"{'b' * 200}{n}" for n in range(9)], weight=3
    )
    b = files(tmp_path, "b.jsonl", [f"{'z' * 9}{n}" for n in range(99)])
    dataset, held_out, summary = mix([a, b], 40, 4)
    assert len(dataset) == 40
    of_a, of_z = letters(tiny_tokenizer, "bz")
    rows = dataset["input_ids"]
    assert sum(of_a in row for row in rows) == 30
    assert sum(of_z in row for row in rows) == 10
    assert [of_a in block for block in held_out] == [True] * 3 + [False]
    assert [part["tokens"] for part in summary.values()] == [480, 160]
    assert dataset[7]["labels"] == dataset[7]["input_ids"]
    assert all(len(row) == LENGTH for row in rows)


def test_the_held_out_slice_is_never_trained_on(
    tmp_path: Path, tiny_tokenizer: Any, mix: Mix
) -> None:
    """Over several passes, and not from another source that has the same document."""
    words = [f"{chr(97 + n // 26)}{chr(97 + n % 26)}" * 12 for n in range(100)]
    a = files(tmp_path, "a.jsonl", words[:60])
    b = files(tmp_path, "b.jsonl", words[50:] + words[:50], weight=2)
    dataset, held_out, summary = mix([a, b], 500, 12)
    assert len(held_out) == 12
    assert min(part["passes"] for part in summary.values()) > 1
    assert sum(part["held_out_tokens"] for part in summary.values()) == 12 * LENGTH

    held = tiny_tokenizer.decode([i for block in held_out for i in block])
    gone = {word for word in words if word in held}  # whole documents of the slice
    assert len(gone) > 3
    trained = tiny_tokenizer.decode([i for row in dataset["input_ids"] for i in row])
    assert not [word for word in gone if word in trained]
    assert sum(word in trained for word in words) >= len(words) - 4 * len(gone)


def test_a_source_that_ends_is_read_again_in_another_order(tmp_path: Path, mix: Mix) -> None:
    a = files(tmp_path, "a.jsonl", [unlike(n) for n in range(10)])
    dataset, _, summary = mix([a], 180)
    facts = summary[a.name]
    available = facts["tokens_on_disk"] // LENGTH
    assert facts["passes"] in (180 // available, 180 // available + 1)
    assert facts["whole_source"]
    assert facts["documents"] == 10
    rows = [tuple(row) for row in dataset["input_ids"]]
    first, second = set(rows[:available]), set(rows[available : 2 * available])
    assert len(second - first) > available // 2


def test_reproducible_by_seed(tmp_path: Path, mix: Mix) -> None:
    a = files(tmp_path, "a.jsonl", [unlike(n) for n in range(10)])

    def rows(seed: int) -> Any:
        return mix([a], 100, seed=seed)[0]["input_ids"]

    assert rows(1) == rows(1) != rows(2)


def test_the_summary(tmp_path: Path, mix: Mix) -> None:
    a = files(
        tmp_path, "a.jsonl", [f"cat {n} " * 20 for n in range(30)] + ["", "secret", "cat", "cat"]
    )
    _, _, summary = mix([a], 1000, overlaps=lambda text: text == "secret")
    facts = summary[a.name]
    assert facts["dropped"] == {"empty": 1, "overlaps held-out text": 1, "duplicate": 1}
    assert facts["documents"] == 31
    assert facts["bytes"] == sum(len(f"cat {n} ") * 20 for n in range(30)) + 3
    assert facts["bytes_per_token"] == round(facts["bytes"] / facts["tokens_on_disk"], 3)
    (line,) = summary_lines(summary)
    assert line.startswith(f"{a.name}: 16,000 tokens to train on; ")
    assert "31 documents" in line
    assert "1 duplicate" in line


def test_shared_shards_are_read_by_other_runs(tmp_path: Path, mix: Mix) -> None:
    a = files(tmp_path, "a.jsonl", [unlike(n) for n in range(10)])
    first, _, _ = mix([a], 20, shared=tmp_path / "shared")
    rows = first["input_ids"]

    def never_asked(text: str) -> bool:
        raise AssertionError("it was tokenised again")

    again, _, _ = mix([a], 20, shared=tmp_path / "shared", overlaps=never_asked)
    assert again["input_ids"] == rows
    assert len(list((tmp_path / "shared").glob("*/shards.json"))) == 1


def test_a_source_that_is_too_small(tmp_path: Path, mix: Mix) -> None:
    a = files(tmp_path, "a.jsonl", ["cat"])
    with pytest.raises(FastDraftError, match=r"give no block of 16 to train on; lower max_length"):
        mix([a], 4)
    b = files(tmp_path, "b.jsonl", ["x" * 33])
    dataset, held_out, _ = mix([b], 4, 2)
    assert (len(dataset), held_out) == (4, [])  # at most a fifth is held out


def test_a_data_set_of_blocks_is_small_in_memory(tmp_path: Path, mix: Mix) -> None:
    import copy
    import pickle

    a = files(tmp_path, "a.jsonl", [f"{n}" * 300 for n in range(100, 140)])
    dataset, _, _ = mix([a], 500)
    ids = dataset.data.column("input_ids")
    first = ids.chunk(0)
    assert dataset.data.nbytes > 0
    # What `Trainer` does to it (columns, selections, copies) leaves the ids where they are.
    moved = copy.deepcopy(dataset.remove_columns("labels")).select(range(3))
    assert moved.data.column("input_ids").chunk(0).values.buffers()[1].address == (
        first.values.buffers()[1].address
    )
    assert pickle.loads(pickle.dumps(moved))["input_ids"] == dataset["input_ids"][:3]
