"""The target's stored distribution: what is written is what a plain forward pass gives."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Gemma2Config, Gemma2ForCausalLM, GraniteConfig, GraniteForCausalLM

from fastdraft_hf import FastDraftError
from fastdraft_hf.data import columns
from fastdraft_hf.data import target_logits as module
from fastdraft_hf.data.engines import Completion, Request
from fastdraft_hf.data.generations import write_rows
from fastdraft_hf.data.parts import PARTS, iter_rows, read_part, stored_indices
from fastdraft_hf.data.target_logits import FLOOR, _batches, stored_bytes, write_target_logits

from .fakes import Killed, in_processes

Make = Callable[..., Any]
V = 288
LENGTHS = st.lists(st.tuples(st.integers(0, 5), st.integers(1, 6)), max_size=9)


@pytest.fixture(scope="module")
def target(tiny_model: Make) -> Any:
    return tiny_model(seed=2)


class Writer:
    name = "writer"

    def __init__(self, seed: int, low: int = 3, high: int = V) -> None:
        self.generator, self.range = torch.Generator().manual_seed(seed), (low, high)

    def ids(self, count: int) -> tuple[int, ...]:
        return tuple(torch.randint(*self.range, (count,), generator=self.generator).tolist())

    def generate(self, requests: Any, on_tokens: Any) -> Any:
        for request in requests:
            yield Completion(request, self.ids(request.max_new_tokens), "length")


def write_set(folder: Path, lengths: list[tuple[int, int]], seed: int = 0, **ids: int) -> None:
    """Write rows of (prompt, completion) lengths."""
    writer = Writer(seed, **ids)
    requests = [
        Request(number, writer.ids(prompt), 0.0, number, length, "s")
        for number, (prompt, length) in enumerate(lengths)
    ]
    write_rows(writer, requests, folder)


def check_rows(folder: Path, generated: Path, model: Any, k: int, temperature: float) -> None:
    """Hold every stored number against the target reading the row alone, in float64."""
    rows = list(iter_rows(folder))
    kept = {row["index"]: row for row in iter_rows(generated)}
    kept = {index: kept[index] for index in stored_indices(folder).tolist()}
    assert [row["index"] for row in rows] == list(kept)
    for row in rows:
        source = kept[row["index"]]
        prompt, completion = source["prompt_ids"], source["completion_ids"]
        assert row["input_ids"] == prompt + completion
        assert row["labels"] == [-100] * len(prompt) + completion
        assert row[columns.TEMPERATURE] == temperature
        positions, ids, log_probs = columns.stored(row)
        first = max(1, len(prompt))
        assert positions.tolist() == list(range(first, len(row["input_ids"])))
        assert all(len(row[name]) == len(row["input_ids"]) for name in columns.LISTS)
        if not len(positions):
            continue
        with torch.no_grad():
            logits = model(torch.tensor([row["input_ids"]])).logits[0, first - 1 : -1].double()
        exact = torch.log_softmax(logits / temperature, -1)
        chosen = torch.from_numpy(ids)
        assert ids.shape == (len(exact), k)
        assert all(len(set(entry)) == k for entry in chosen.tolist())
        # float16 has eleven bits; float32's order of summation is below that.
        close = {"rtol": 2**-10, "atol": 1e-4}
        stored = torch.from_numpy(log_probs.astype(np.float64))
        torch.testing.assert_close(stored, exact.gather(1, chosen), **close)
        torch.testing.assert_close(stored, exact.topk(k, -1).values, **close)
        tail = exact.scatter(1, chosen, float("-inf")).logsumexp(-1).clamp(min=FLOOR)
        found = torch.tensor(row[columns.TAIL], dtype=torch.float64)
        torch.testing.assert_close(found[first:], tail, **close)
        assert not found[:first].any()


@settings(max_examples=25)
@given(
    lengths=LENGTHS,
    top_k=st.sampled_from([1, 2, 7, V - 1, V]),
    temperature=st.sampled_from([0.5, 1.0, 2.0]),
    batch_tokens=st.sampled_from([1, 9, 25, 4096]),
    rows_per_part=st.integers(1, 5),
    window=st.integers(1, 5),
    head_tokens=st.sampled_from([1, 3, 512]),
    world=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_what_is_stored_is_a_forward_pass_of_the_row_alone(
    target: Any,
    lengths: list[tuple[int, int]],
    top_k: int,
    temperature: float,
    batch_tokens: int,
    rows_per_part: int,
    window: int,
    head_tokens: int,
    world: int,
    seed: int,
) -> None:
    progress: list[int] = []
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_HEAD_TOKENS", head_tokens)
        patch.setattr(module, "_WINDOW", window)
        generated, folder = Path(name) / "rows", Path(name) / "logits"
        write_set(generated, lengths, seed)

        def work(rank: int) -> None:
            write_target_logits(
                target,
                generated,
                folder,
                top_k=top_k,
                temperature=temperature,
                batch_tokens=batch_tokens,
                rows_per_part=rows_per_part,
                on_progress=progress.append,
            )

        in_processes(world, work)
        check_rows(folder, generated, target, top_k, temperature)
        rows = len(stored_indices(folder))
        assert sum(progress) == rows == len({*map(str, _kept(generated))})


def _kept(generated: Path) -> list[int]:
    return module.kept_indices(generated)[0].tolist()


TINY = {
    "vocab_size": V,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
}


@pytest.mark.parametrize("kind", ["gemma2", "granite"])
def test_heads_that_scale_or_cap_their_logits(tmp_path: Path, kind: str) -> None:
    torch.manual_seed(0)
    if kind == "gemma2":
        model: Any = Gemma2ForCausalLM(Gemma2Config(**TINY, final_logit_softcapping=0.5))
    else:
        model = GraniteForCausalLM(GraniteConfig(**TINY, logits_scaling=0.05))
    model.eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)
    write_set(tmp_path / "rows", [(2, 3), (1, 4), (3, 1)])
    write_target_logits(model, tmp_path / "rows", tmp_path / "logits", top_k=6, temperature=1.0)
    check_rows(tmp_path / "logits", tmp_path / "rows", model, 6, 1.0)


def test_more_tokens_than_the_vocabulary_has(target: Any, tmp_path: Path) -> None:
    write_set(tmp_path / "rows", [(1, 1)])
    with pytest.raises(FastDraftError, match="top_k: 289 is more than the target's vocabulary of"):
        write_target_logits(target, tmp_path / "rows", tmp_path / "x", top_k=289, temperature=1.0)
    assert not (tmp_path / "x").exists()


def test_only_missing_rows_are_read(
    target: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a kill, after a part was deleted, and after the set grew."""
    generated, folder = tmp_path / "rows", tmp_path / "logits"
    lengths = [(1 + n % 3, 2 + n % 4) for n in range(20)]
    write_set(generated, lengths[:12])
    read: list[int] = []
    real = module._stored_table

    def counted(reader: Any, rows: Any, *args: Any) -> Any:
        if kill and len(read) > 6:
            raise Killed
        read.extend(row["index"] for row in rows)
        return real(reader, rows, *args)

    monkeypatch.setattr(module, "_stored_table", counted)
    given: dict[str, Any] = {"top_k": 4, "temperature": 1.0, "batch_tokens": 8, "rows_per_part": 3}
    kill = True
    with pytest.raises(Killed):
        write_target_logits(target, generated, folder, **given)
    kill, first = False, len(read)
    assert first < 12
    assert write_target_logits(target, generated, folder, **given) == {
        "rows": 12,
        "new": 12 - first,
    }
    assert sorted(read) == list(range(12))
    lost = read_part(next(folder.glob(PARTS)))["index"].to_pylist()
    next(folder.glob(PARTS)).unlink()
    read.clear()
    write_target_logits(target, generated, folder, **given)
    assert sorted(read) == sorted(lost)
    read.clear()
    write_set(generated, lengths)
    write_target_logits(target, generated, folder, **given)
    assert sorted(read) == list(range(12, 20))
    check_rows(folder, generated, target, 4, 1.0)


@given(lengths=LENGTHS, tokens=st.integers(1, 60))
def test_batches_hold_every_row_once_and_no_more_than_they_may(
    lengths: list[tuple[int, int]], tokens: int
) -> None:
    rows = [
        {"index": n, "prompt_ids": [0] * prompt, "completion_ids": [0] * completion}
        for n, (prompt, completion) in enumerate(lengths)
    ]
    batches = list(_batches(rows, tokens))
    assert all(batches)
    assert sorted(row["index"] for batch in batches for row in batch) == list(range(len(rows)))
    for batch in batches:
        longest = max(len(row["prompt_ids"]) + len(row["completion_ids"]) for row in batch)
        assert len(batch) == 1 or longest * len(batch) <= tokens
    # Two neighbors that fit into one batch are not both alone.
    for one, other in itertools.pairwise(batches):
        longest = len(other[0]["prompt_ids"]) + len(other[0]["completion_ids"])
        assert longest * (len(one) + 1) > tokens


@given(st.integers(0, 50), st.integers(1, 9), st.sampled_from([9, 2**16, 2**16 + 1]))
def test_the_size_is_that_of_the_numbers(n: int, k: int, vocab_size: int) -> None:
    kind = np.uint16 if vocab_size <= 2**16 else np.int32
    parts = (np.zeros((n, k), kind), np.zeros((n, k), np.float16), np.zeros(n, np.float16))
    assert stored_bytes(n, k, vocab_size) == sum(part.nbytes for part in parts)


@pytest.mark.parametrize(("vocab_size", "kind"), [(V, "uint16"), (70_000, "int32")])
def test_ids_take_the_fewest_bytes(
    tmp_path: Path, tiny_model: Make, vocab_size: int, kind: str
) -> None:
    model = tiny_model(
        vocab_size=vocab_size, hidden_size=8, intermediate_size=8, num_hidden_layers=1
    )
    low = vocab_size - 200
    with torch.no_grad():
        model.model.embed_tokens.weight[:low] = 0  # probable ids are above, or below 0
    write_set(tmp_path / "rows", [(1, 3)], low=low, high=vocab_size)
    write_target_logits(model, tmp_path / "rows", tmp_path / "logits", top_k=8, temperature=1.0)
    (part,) = (tmp_path / "logits").glob(PARTS)
    assert kind in str(read_part(part).schema.field(columns.IDS).type)
    check_rows(tmp_path / "logits", tmp_path / "rows", model, 8, 1.0)
