"""Packed text of a stage: shares, what is held out, kills, and a stream that resumes anywhere."""

import json
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from fastdraft_hf._errors import FastDraftError
from fastdraft_hf.data import corpus as module
from fastdraft_hf.data import packing
from fastdraft_hf.data.corpus import Corpus, block_shares, open_corpus, summary_lines
from fastdraft_hf.data.packing import BlockStream, Encoder
from fastdraft_hf.data.parts import write_rows
from fastdraft_hf.data.sources import Source

from .fakes import FakeEngine, make_requests

LENGTH, WINDOW, END = 16, 6, 0
Make = Callable[..., Corpus]


class Overlaps:
    """Stands for a `Decontaminator`."""

    held_out: dict[str, list[str]] = {"task": ["digest"]}

    def overlaps(self, text: str) -> bool:
        return "secret" in text


def jsonl(path: Path, texts: list[str], **fields: Any) -> Source:
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts), encoding="utf-8")
    return Source(kind="files", name=str(path), **fields)


def unlike(number: int) -> str:
    """Return a text of about 90 characters that repeats nothing."""
    return " ".join(str((number * 30 + i) * 7919) for i in range(14))


@pytest.fixture
def corpus(tmp_path: Path, tiny_tokenizer: Any) -> Make:
    number = iter(range(99))

    def make(sources: list[Source], blocks: int, eval_rows: int = 0, **changes: Any) -> Corpus:
        given: dict[str, Any] = {
            "folder": tmp_path / f"corpus-{next(number)}",
            "tokens": blocks * LENGTH + 3,
            "max_length": LENGTH,
            "eval_rows": eval_rows,
            "seed": 0,
            "generated": tmp_path,
        }
        return open_corpus(sources, tiny_tokenizer, **{**given, **changes})

    return make


def ids_of(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def test_a_document_is_closed_by_one_end_token(tiny_tokenizer: Any) -> None:
    """Generated ids are not tokenized again; free text begins with the end token."""
    cat = ids_of(tiny_tokenizer, "the cat")
    batch = ["the cat", "hät", [END, 5, 6], [1, 7, 2], [END, 8, END]]
    made, dropped = Encoder(tiny_tokenizer)(batch)
    assert [one.ids.tolist() for one in made] == [
        [*cat, END],
        [*ids_of(tiny_tokenizer, "hät"), END],
        [5, 6, END],
        [1, 7, 2, END],
        [8, END],
    ]
    assert made[0].ids.dtype == np.uint16
    assert not dropped


def test_dropped_documents_are_counted(tiny_tokenizer: Any) -> None:
    encode = Encoder(tiny_tokenizer, Overlaps())  # type: ignore[arg-type]
    secret = ids_of(tiny_tokenizer, "a secret")
    made, dropped = encode(["", " \n", "a secret", secret, "the hat", "broken \ud800 pair"])
    assert dropped == {"empty": 2, "overlaps held-out text": 2}
    assert len(made) == 2


def test_a_special_token_in_a_document_does_not_end_it(tiny_tokenizer: Any) -> None:
    ((made,), _) = Encoder(tiny_tokenizer)(["cat<|endoftext|>hat<|im_end|>"])
    assert np.flatnonzero(made.ids == END).tolist() == [len(made.ids) - 1]
    assert tiny_tokenizer.eos_token_id not in made.ids


@given(st.lists(st.floats(0.001, 1000), min_size=1, max_size=6), st.integers(0, 10_000))
def test_shares_add_up(weights: list[float], blocks: int) -> None:
    counts = block_shares([Source(kind="python", weight=w) for w in weights], blocks)
    assert sum(counts) == blocks
    exact = [blocks * w / sum(weights) for w in weights]
    assert all(abs(c - e) <= 1 for c, e in zip(counts, exact, strict=True))


def test_weights_are_shares_of_tokens(tmp_path: Path, tiny_tokenizer: Any, corpus: Make) -> None:
    """Whatever the lengths of the documents: those of the first are twenty times longer."""
    a = jsonl(tmp_path / "a.jsonl", [f"{'b' * 200}{n}" for n in range(10)], weight=3)
    b = jsonl(tmp_path / "b.jsonl", [f"{'z' * 9}{n}" for n in range(99)])
    made = corpus([a, b], 40, 4)
    of_b, of_z = tiny_tokenizer.convert_tokens_to_ids(["b", "z"])
    rows = made.train["input_ids"]
    assert [sum(id in row for row in rows) for id in (of_b, of_z)] == [30, 10]
    assert [of_b in block for block in made.eval["input_ids"]] == [True] * 3 + [False]
    assert all(len(row) == LENGTH for row in rows)
    parts = made.summary["sources"].values()
    assert [part["tokens"] for part in parts] == [480, 160]
    assert sum(part["held_out_tokens"] for part in parts) == 4 * LENGTH


@pytest.mark.parametrize("streaming", [False, True])
def test_held_out_documents_are_never_trained_on(
    tmp_path: Path, tiny_tokenizer: Any, corpus: Make, streaming: bool
) -> None:
    """In no pass, and not from another source that has the same document."""
    # A document per block: with its end, each has 16 ids.
    words = [f"{c}{d}" * 7 + c for c in "bcdfgjklm" for d in "pqrvwxyz"]
    a = jsonl(tmp_path / "a.jsonl", words[:50])
    b = jsonl(tmp_path / "b.jsonl", words[40:] + words[:40], weight=2)
    made = corpus([a, b], 500, 12, streaming=streaming)

    def texts(rows: Any) -> set[str]:
        return {tiny_tokenizer.decode(row["input_ids"][:-1]) for row in rows}

    held, trained = texts(made.eval), texts(islice(made.train, 500))
    assert len(made.eval) == 12
    assert len(held) >= 10
    assert trained == set(words) - held
    assert (tmp_path / "corpus-0" / "train.arrow").exists() is not streaming
    if not streaming:
        assert min(part["passes"] for part in made.summary["sources"].values()) > 1


def test_a_source_that_ends_is_read_again_in_another_order(tmp_path: Path, corpus: Make) -> None:
    for n in range(10):
        (tmp_path / f"{n}.txt").write_text(unlike(n))
    a = Source(kind="files", name=str(tmp_path / "*.txt"))
    made, other = corpus([a], 180), corpus([a], 180, seed=1)
    facts = made.summary["sources"][a.name]
    per_pass = 10 * 110 // LENGTH
    assert 180 // per_pass - 2 <= facts["passes"] <= 180 // per_pass + 2
    assert facts["documents"] == 10
    rows = [tuple(row) for row in made.train["input_ids"]]
    assert rows != [tuple(row) for row in other.train["input_ids"]]
    assert len(set(rows[per_pass : 2 * per_pass]) - set(rows[:per_pass])) > per_pass // 2


def test_the_summary(tmp_path: Path, corpus: Make) -> None:
    texts = [f"cat {n} " * 20 for n in range(30)] + ["", "secret", "cat", "cat"]
    a = jsonl(tmp_path / "a.jsonl", texts)
    made = corpus([a], 1000, decontaminator=Overlaps())
    facts = made.summary["sources"][a.name]
    assert made.summary["held_out"] == Overlaps.held_out
    assert facts["dropped"] == {"empty": 1, "overlaps held-out text": 1, "duplicate": 1}
    assert facts["documents"] == 31
    (line,) = summary_lines(made.summary["sources"])
    assert line.startswith(f"{a.name}: 16,000 tokens; ")
    assert "31 documents" in line
    assert "1 dropped (duplicate)" in line


@pytest.mark.parametrize("streaming", [False, True])
def test_a_source_that_is_too_small(tmp_path: Path, corpus: Make, streaming: bool) -> None:
    a = jsonl(tmp_path / "a.jsonl", ["cat"])
    with pytest.raises(FastDraftError, match=r"give no block of 16 to train on; lower max_length"):
        corpus([a], 4, streaming=streaming)
    b = jsonl(tmp_path / "b.jsonl", ["a secret", ""])
    with pytest.raises(
        FastDraftError, match=r"no text to train on \(overlaps.*: 1, empty: 1\)|: 1"
    ):
        corpus([b], 4, streaming=streaming, decontaminator=Overlaps())
    c = jsonl(tmp_path / "c.jsonl", ["x" * 33])
    made = corpus([c], 4, 2, streaming=streaming)
    assert made.eval is None  # at most a fifth is held out
    assert len(list(islice(made.train, 4))) == 4


def test_the_blocks_stay_on_the_disk(tmp_path: Path, corpus: Make) -> None:
    a = jsonl(tmp_path / "a.jsonl", [f"{n}" * 300 for n in range(100, 140)])
    before = pa.total_allocated_bytes()
    made = corpus([a], 500)
    assert made.train.data.nbytes >= 500 * LENGTH * 2
    assert pa.total_allocated_bytes() - before < 500 * LENGTH
    assert made.train.cache_files


def test_a_killed_writer_starts_again(
    tmp_path: Path, corpus: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = [jsonl(tmp_path / f"{n}.jsonl", [unlike(n + i) for i in range(40)]) for n in (0, 40)]
    whole, folder = corpus(sources, 200, 4), tmp_path / "killed"
    for name in ("atomic_file", "write_json"):

        def die(*args: Any) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(module, name, die)
            with pytest.raises(KeyboardInterrupt):
                corpus(sources, 200, 4, folder=folder)
    resumed = corpus(sources, 200, 4, folder=folder)
    assert list(resumed.train["input_ids"]) == list(whole.train["input_ids"])
    assert list(resumed.eval["input_ids"]) == list(whole.eval["input_ids"])
    assert resumed.summary == whole.summary


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> list[Source]:
    """Local lines, a stream as from the Hub, and a generated set."""
    folder = tmp_path_factory.mktemp("sources")
    lines = jsonl(folder / "a.jsonl", [f"{'b' * (7 * n % 31)}{n}" for n in range(40)], weight=3)
    (folder / "hub").mkdir()
    for part in range(2):
        texts = [f"{'z' * (5 * n % 17)}{n}{part}" for n in range(30)]
        path = folder / "hub" / f"train-{part}.parquet"
        pq.write_table(pa.table({"text": texts}), path, row_group_size=8)
    write_rows(FakeEngine(), make_requests(12), folder / "mine")
    return [
        lines,
        Source(kind="hub", name=str(folder / "hub"), weight=2),
        Source(kind="generated", name="mine", weight=1),
    ]


@pytest.fixture
def open_stream(
    mixture: list[Source], tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., BlockStream]:
    monkeypatch.setattr(packing, "_ENCODED", 3)
    monkeypatch.setattr(packing, "WINDOW", WINDOW)

    def build(seed: int = 0) -> BlockStream:
        encode, generated = Encoder(tiny_tokenizer), Path(mixture[0].name).parent
        return BlockStream(mixture, encode, length=8, seed=seed, generated=generated)

    return build


def take(blocks: BlockStream, count: int) -> list[list[int]]:
    return [row["input_ids"] for row in islice(blocks, count)]


def test_every_iteration_begins_at_the_start(open_stream: Callable[..., BlockStream]) -> None:
    blocks = open_stream()
    assert take(blocks, 20) == take(blocks, 20) == take(open_stream(), 20)
    assert take(open_stream(1), 20) != take(blocks, 20)
    rows = [row["input_ids"] for row in blocks.as_dataset().repeat(None).take(30)]
    assert rows == take(blocks, 30)
    assert {len(row) for row in rows} == {8}


def test_shares_of_a_stream_are_exact_in_every_window(
    open_stream: Callable[..., BlockStream], mixture: list[Source]
) -> None:
    blocks = open_stream()
    take(blocks, 150)
    read = blocks.state_dict(144)["read"]
    counts = [read[key]["tokens"] / 8 for key in (mixture[0].name, mixture[1].name, "mine")]
    assert sum(counts) % WINDOW == 0
    for count, share in zip(counts, (3, 2, 1), strict=True):
        assert abs(count - sum(counts) * share / 6) <= 1


@settings(max_examples=20)
@given(data=st.data())
def test_a_stream_resumes_at_any_block(open_stream: Callable[..., BlockStream], data: Any) -> None:
    """Also in later passes, in the middle of windows and batches, and twice over."""
    whole = take(open_stream(), 160)
    first = data.draw(st.integers(0, 90))
    ahead = data.draw(st.integers(1, 20))  # a loader fetches some that are not trained on
    blocks = open_stream()
    assert take(blocks, first + ahead) == whole[: first + ahead]
    state = json.loads(json.dumps(blocks.state_dict(first)))
    resumed = open_stream()
    resumed.load_state_dict(state)
    assert resumed.start == first
    second = data.draw(st.integers(0, 40))
    assert take(resumed, second + 3) == whole[first : first + second + 3]
    again = open_stream()
    again.load_state_dict(json.loads(json.dumps(resumed.state_dict(first + second))))
    assert take(again, 20) == whole[first + second : first + second + 20]
    at = first + second
    assert again.state_dict(at)["sources"] == resumed.state_dict(at)["sources"]
    assert again.state_dict(at)["read"] == resumed.state_dict(at)["read"]  # facts continue too


def test_a_stream_is_not_read_by_a_worker(open_stream: Callable[..., BlockStream]) -> None:
    loader = DataLoader(open_stream().as_dataset(), num_workers=1)
    with pytest.raises(FastDraftError, match="dataloader_num_workers: must be 0 with a stream"):
        next(iter(loader))
