"""The columns of a stored distribution: written, saved, loaded, checked and collated unchanged."""

import tempfile
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdraft_hf.data import columns as module
from fastdraft_hf.data.columns import (
    IDS,
    LISTS,
    LOG_PROBS,
    TAIL,
    TEMPERATURE,
    check_distribution,
    distribution_table,
    has_distribution,
    smallest_id_type,
)
from fastdraft_hf.data.target_logits import top_k_of
from fastdraft_hf.train.rows import DraftCollator

Parts = list[tuple[int, np.ndarray, np.ndarray, np.ndarray]]


def parts_of(lengths: list[tuple[int, int]], k: int, vocab_size: int, seed: int) -> Parts:
    """Random distributions over the last n tokens of rows, for (length, n)."""
    generator = torch.Generator().manual_seed(seed)
    kind = smallest_id_type(vocab_size)
    parts = []
    for length, n in lengths:
        logits = torch.randn(n, vocab_size, generator=generator) * 3
        ids, log_probs, tail = (part.numpy() for part in top_k_of(logits, k))
        parts.append(
            (length, ids.astype(kind), log_probs.astype(np.float16), tail.astype(np.float16))
        )
    return parts


def dataset_of(parts: Parts, temperature: float, vocab_size: int, seed: int) -> datasets.Dataset:
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for length, ids, _, _ in parts:
        text = torch.randint(0, vocab_size, (length,), generator=generator).tolist()
        prompt = length - len(ids)
        rows.append({"input_ids": text, "labels": [-100] * prompt + text[prompt:]})
    features = datasets.Features(
        {name: datasets.List(datasets.Value("int64")) for name in ("input_ids", "labels")}
    )
    plain = datasets.Dataset.from_list(rows, features=features)
    table = datasets.table.InMemoryTable(distribution_table(parts, temperature))
    return datasets.concatenate_datasets([plain, datasets.Dataset(table)], axis=1)


# (length, n) with a first token that stores nothing, as nothing predicts it.
LENGTHS = st.lists(
    st.integers(1, 9).flatmap(
        lambda length: st.tuples(st.just(length), st.integers(0, length - 1))
    ),
    min_size=1,
    max_size=12,
)


@settings(max_examples=30)
@given(
    lengths=LENGTHS,
    k=st.integers(1, 9),
    vocab_size=st.sampled_from([9, 300, 2**16, 2**16 + 1]),
    temperature=st.sampled_from([0.3, 1.0, 2.0]),
    flattened=st.booleans(),
    multiple=st.sampled_from([None, 4]),
    seed=st.integers(0, 99),
)
def test_from_the_table_to_the_batch_nothing_changes(
    lengths: list[tuple[int, int]],
    k: int,
    vocab_size: int,
    temperature: float,
    flattened: bool,
    multiple: int | None,
    seed: int,
) -> None:
    if not any(n for _, n in lengths):
        lengths = [*lengths, (3, 2)]
    parts = parts_of(lengths, k, vocab_size, seed)
    with tempfile.TemporaryDirectory() as folder:
        dataset_of(parts, temperature, vocab_size, seed).save_to_disk(folder)
        dataset = datasets.load_from_disk(folder)
        assert has_distribution(dataset)
        for read in (dataset, dataset.to_iterable_dataset()):
            check_distribution(read, vocab_size=vocab_size, temperature=temperature)
        rows = dataset.to_list()
    assert all(row[TEMPERATURE] == pytest.approx(temperature) for row in rows)
    assert all(len(row[name]) == len(row["input_ids"]) for row in rows for name in LISTS)

    collator = DraftCollator(
        pad_token_id=0,
        padding_free=flattened,
        pad_to_multiple_of=multiple,
        vocab_size=vocab_size,
    )
    batch = collator(rows)
    shape = batch["input_ids"].shape
    wanted_ids = torch.zeros(*shape, k, dtype=torch.int64)
    wanted_log_probs = torch.zeros(*shape, k, dtype=torch.float16)
    wanted_tail = torch.zeros(shape, dtype=torch.float16)
    start = 0
    for number, (length, ids, log_probs, tail) in enumerate(parts):
        row, end = (0, start + length) if flattened else (number, length)
        place = slice(end - len(ids), end)
        wanted_ids[row, place] = torch.from_numpy(ids.astype(np.int64))
        wanted_log_probs[row, place] = torch.from_numpy(log_probs)
        wanted_tail[row, place] = torch.from_numpy(tail)
        start += length
    for name, wanted in ((IDS, wanted_ids), (LOG_PROBS, wanted_log_probs), (TAIL, wanted_tail)):
        assert batch[name].dtype == wanted.dtype
        assert torch.equal(batch[name], wanted), name
    # Whatever carries loss has its distribution; a sequence's first token carries none.
    assert (batch[TAIL][batch["labels"] != -100] != 0).all()
    assert int((batch["labels"] != -100).sum()) == sum(n for _, n in lengths)


def test_a_set_that_is_read_part_by_part_is_not_looked_through_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = dataset_of(parts_of([(4, 2)] * 6, 3, 300, 0), 1.0, 300, 0).to_list()
    rows[5][IDS][-1][0] = 999
    dataset = datasets.Dataset.from_list(rows)
    with pytest.raises(ValueError, match="row 5: target_top_k_ids holds 999"):
        check_distribution(dataset, vocab_size=300, temperature=1.0)
    monkeypatch.setattr(module, "_CHECKED_ROWS", 2)
    check_distribution(dataset, vocab_size=300, temperature=1.0)
    # What lies beyond is looked at when it is read.
    collator = DraftCollator(pad_token_id=0, vocab_size=300)
    with pytest.raises(ValueError, match="row 1 of a batch: target_top_k_ids holds 999"):
        collator(rows[4:])


def test_has_distribution_by_what_there_is() -> None:
    rows = dataset_of(parts_of([(4, 2)], 3, 300, 0), 1.0, 300, 0)
    plain = rows.remove_columns([*LISTS, TEMPERATURE])
    assert has_distribution(rows)
    assert has_distribution(rows.to_iterable_dataset())
    assert not has_distribution(plain)
    assert not has_distribution(plain.to_iterable_dataset())

    def unnamed() -> Any:  # a generator does not say its columns
        yield from rows

    assert has_distribution(datasets.IterableDataset.from_generator(unnamed))
    for column in LISTS:
        with pytest.raises(ValueError, match=f"late dataset: it has .* but not {column}; a stored"):
            has_distribution(rows.remove_columns([column]), "late")
