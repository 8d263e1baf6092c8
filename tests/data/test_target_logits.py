"""The target's stored distribution: what is written is what a plain forward pass gives."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Gemma2Config, Gemma2ForCausalLM, GraniteConfig, GraniteForCausalLM

from fastdraft_hf import FastDraftError
from fastdraft_hf.data import target_logits as module
from fastdraft_hf.data.target_logits import (
    FLOOR,
    MANIFEST,
    StoredLogits,
    _batches,
    stored_bytes,
    write_target_logits,
)

Make = Callable[..., Any]
Rows = list[dict[str, Any]]
V = 288


class Killed(BaseException):
    """Nothing of ours catches it."""


@pytest.fixture(scope="module")
def target(tiny_model: Make) -> Any:
    return tiny_model(seed=2)


def rows_of(lengths: list[tuple[int, int]], seed: int = 0) -> Rows:
    """Rows of (prompt, completion) lengths; indices are no positions, as after a cut-off run."""
    generator = torch.Generator().manual_seed(seed)

    def ids(count: int) -> list[int]:
        return torch.randint(3, V, (count,), generator=generator).tolist()

    return [
        {"index": 3 * number + 1, "prompt_ids": ids(p), "completion_ids": ids(c)}
        for number, (p, c) in enumerate(lengths)
    ]


def expected(model: Any, row: dict[str, Any], temperature: float) -> torch.Tensor:
    """log p [n, V] of every completion token that has a past, from the row alone, in float64."""
    text = torch.tensor([[*row["prompt_ids"], *row["completion_ids"]]])
    first = max(1, len(row["prompt_ids"]))
    if not row["completion_ids"]:
        return torch.zeros(0, V, dtype=torch.float64)
    with torch.no_grad():
        logits = model(text).logits[0, first - 1 : -1].double()
    return torch.log_softmax(logits / temperature, -1)


def check_row(stored: StoredLogits, model: Any, row: dict[str, Any]) -> None:
    ids, log_probs, tail = stored.of_row(row["index"])
    exact = expected(model, row, stored.temperature)
    k = stored.top_k
    assert ids.shape == log_probs.shape == (len(exact), k)
    assert tail.shape == (len(exact),)
    assert (ids.dtype, log_probs.dtype, tail.dtype) == (np.uint16, np.float16, np.float16)
    if not len(exact):
        return
    chosen = torch.from_numpy(ids.astype(np.int64))
    assert all(len(set(entry)) == k for entry in chosen.tolist())
    # float16 has eleven bits; float32's order of summation is below that.
    close = {"rtol": 2**-10, "atol": 1e-4}
    kept = torch.from_numpy(log_probs.astype(np.float64))
    torch.testing.assert_close(kept, exact.gather(1, chosen), **close)
    torch.testing.assert_close(kept, exact.topk(k, -1).values, **close)
    rest = exact.scatter(1, chosen, float("-inf")).logsumexp(-1).clamp(min=FLOOR)
    torch.testing.assert_close(torch.from_numpy(tail.astype(np.float64)), rest, **close)


LENGTHS = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 6)), max_size=9)


@settings(max_examples=30)
@given(
    lengths=LENGTHS,
    top_k=st.sampled_from([1, 2, 7, V - 1, V]),
    temperature=st.sampled_from([0.5, 1.0, 2.0]),
    batch_tokens=st.sampled_from([1, 9, 25, 4096]),
    rows_per_shard=st.integers(1, 5),
    head_tokens=st.sampled_from([1, 3, 512]),
    seed=st.integers(0, 99),
)
def test_what_is_stored_is_a_forward_pass_of_the_row_alone(
    target: Any,
    lengths: list[tuple[int, int]],
    top_k: int,
    temperature: float,
    batch_tokens: int,
    rows_per_shard: int,
    head_tokens: int,
    seed: int,
) -> None:
    rows = rows_of(lengths, seed)
    told: list[int] = []
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_HEAD_TOKENS", head_tokens)
        folder = Path(name) / "set"
        write_target_logits(
            target,
            rows,
            folder,
            top_k=top_k,
            temperature=temperature,
            batch_tokens=batch_tokens,
            rows_per_shard=rows_per_shard,
            on_progress=told.append,
        )
        stored = StoredLogits(folder)
        assert (stored.top_k, stored.temperature) == (top_k, temperature)
        tokens = sum(len(row["completion_ids"]) for row in rows)
        assert stored.manifest["tokens"] == sum(told) == tokens
        assert stored.manifest["rows"] == len(rows)
        assert len(stored.manifest["shards"]) == -(-len(rows) // rows_per_shard)
        for row in rows:
            check_row(stored, target, row)
        with pytest.raises(FastDraftError, match="row 2 has no stored distribution; run stage log"):
            stored.of_row(2)
        assert sorted(p.name for p in folder.iterdir()) == sorted(
            [MANIFEST, *stored.manifest["shards"]]
        )


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
    rows = rows_of([(2, 3), (0, 4), (3, 1)])
    write_target_logits(model, rows, tmp_path, top_k=6, temperature=1.0)
    for row in rows:
        check_row(StoredLogits(tmp_path), model, row)


def test_more_tokens_than_the_vocabulary_has(target: Any, tmp_path: Path) -> None:
    with pytest.raises(FastDraftError, match="top_k: 289 of a vocabulary of 288"):
        write_target_logits(target, rows_of([(1, 1)]), tmp_path, top_k=289, temperature=1.0)
    assert not list(tmp_path.iterdir())


def test_a_killed_run_goes_on_after_the_last_whole_shard(
    target: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = rows_of([(1 + n % 3, 2 + n % 4) for n in range(12)])
    passes: list[int] = []
    handle = target.register_forward_hook(lambda *args: passes.append(1), always_call=False)
    given: dict[str, Any] = {"top_k": 4, "temperature": 1.0, "batch_tokens": 8, "rows_per_shard": 3}
    whole = tmp_path / "whole"
    write_target_logits(target, rows, whole, **given)
    in_all = len(passes)
    shards = sorted(whole.glob("*.parquet"))
    assert len(shards) == 4
    assert in_all >= 8  # a shard is more than one batch

    folder, done = tmp_path / "killed", 0
    first = sum(len(row["completion_ids"]) for row in rows[:6])

    def kill(tokens: int) -> None:
        nonlocal done
        done += tokens
        if done > first:  # within the third shard
            raise Killed

    passes.clear()
    with pytest.raises(Killed):
        write_target_logits(target, rows, folder, **given, on_progress=kill)
    before = len(passes)
    assert sorted(p.name for p in folder.iterdir()) == ["part-00000.parquet", "part-00001.parquet"]
    with pytest.raises(FastDraftError, match=r"no finished distributions \(manifest.json is missi"):
        StoredLogits(folder)

    told: list[int] = []
    write_target_logits(target, rows, folder, **given, on_progress=told.append)
    # Only the batch of the third shard that was done is done again.
    assert len(passes) == in_all + 1
    assert before < in_all
    assert sum(told) == sum(len(row["completion_ids"]) for row in rows)
    for shard in shards:
        assert pq.read_table(folder / shard.name).equals(pq.read_table(shard))
    # A finished set is left alone.
    passes.clear()
    write_target_logits(target, rows, folder, **given)
    assert not passes
    # Killed after the last shard, before the manifest: nothing is read again.
    (folder / MANIFEST).unlink()
    write_target_logits(target, rows, folder, **given)
    assert not passes
    handle.remove()
    for row in rows:
        check_row(StoredLogits(folder), target, row)


@pytest.fixture
def finished(target: Any, tmp_path: Path) -> Path:
    rows = rows_of([(2, 3)] * 4)
    write_target_logits(target, rows, tmp_path, top_k=3, temperature=1.0, rows_per_shard=2)
    return tmp_path


def test_an_unfinished_set_is_refused(finished: Path) -> None:
    (finished / MANIFEST).unlink()
    with pytest.raises(FastDraftError, match=r"no finished distributions \(manifest.json is miss"):
        StoredLogits(finished)


@pytest.mark.parametrize("damage", ["gone", "cut", "a bit"])
def test_a_damaged_shard_is_named(finished: Path, damage: str) -> None:
    shard = finished / "part-00001.parquet"
    data = bytearray(shard.read_bytes())
    if damage == "gone":
        shard.unlink()
    elif damage == "cut":
        shard.write_bytes(data[:-1])
    else:
        data[len(data) // 2] ^= 1
        shard.write_bytes(data)
    with pytest.raises(FastDraftError, match=r"part-00001.parquet: missing or damaged; delete the"):
        StoredLogits(finished)


@given(lengths=LENGTHS, tokens=st.integers(1, 60))
def test_batches_hold_every_row_once_and_no_more_than_they_may(
    lengths: list[tuple[int, int]], tokens: int
) -> None:
    rows = rows_of(lengths)
    batches = list(_batches(rows, tokens))
    assert all(batches)
    found = [row["index"] for batch in batches for row in batch]
    assert sorted(found) == [row["index"] for row in rows if row["completion_ids"]]
    for batch in batches:
        longest = max(len(row["prompt_ids"]) + len(row["completion_ids"]) for row in batch)
        assert len(batch) == 1 or longest * len(batch) <= tokens
    # Not one batch a row either: two neighbours that fit into one batch are not both alone.
    for one, other in itertools.pairwise(batches):
        longest = len(other[0]["prompt_ids"]) + len(other[0]["completion_ids"])
        assert longest * (len(one) + 1) > tokens


@given(st.integers(0, 50), st.integers(1, 9), st.sampled_from([9, 2**16, 2**16 + 1]))
def test_the_size_that_is_told_is_that_of_the_numbers(n: int, k: int, vocab_size: int) -> None:
    kind = np.uint16 if vocab_size <= 2**16 else np.int32
    parts = (np.zeros((n, k), kind), np.zeros((n, k), np.float16), np.zeros(n, np.float16))
    assert stored_bytes(n, k, vocab_size) == sum(part.nbytes for part in parts)


def test_ids_above_sixteen_bits(tmp_path: Path, tiny_model: Make) -> None:
    model = tiny_model(vocab_size=70_000, hidden_size=8, intermediate_size=8, num_hidden_layers=1)
    with torch.no_grad():
        model.model.embed_tokens.weight[:65_536] = 0  # what is probable lies above, or below 0
    rows = [{"index": 0, "prompt_ids": [69_000], "completion_ids": [68_000, 69_999]}]
    write_target_logits(model, rows, tmp_path, top_k=8, temperature=1.0)
    ids, _, _ = StoredLogits(tmp_path).of_row(0)
    with torch.no_grad():
        wanted = model(torch.tensor([[69_000, 68_000]])).logits[0].topk(8).indices
    assert ids.dtype == np.int32
    assert ids.max() > 65_535
    assert ids.tolist() == wanted.tolist()
