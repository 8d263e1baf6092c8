from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastdraft_hf.decode.records import DecodingRecord
from fastdraft_hf.eval.journal import Journal

MakeRecord = Callable[..., DecodingRecord]

RECORDS = st.builds(
    DecodingRecord,
    path=st.sampled_from(["transformers", "openvino"]),
    task=st.text(max_size=8),
    key=st.text(max_size=8),
    temperature=st.floats(0, 2),
    num_assistant_tokens=st.integers(0, 9),
    tokens=st.lists(st.integers(0, 2**31 - 1), max_size=6),
    seconds=st.floats(0, 1e6),
    target_passes=st.integers(0, 99),
    drafted=st.integers(0, 99),
    accepted=st.integers(0, 99),
    rounds=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=4),
)


@given(st.dictionaries(st.text(max_size=12), RECORDS, max_size=5))
def test_what_was_added_is_read_again(records: dict[str, DecodingRecord]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "records.jsonl"
        journal = Journal(path)
        for label, record in records.items():
            journal.add(label, record)
        for held in (journal, Journal(path)):
            assert list(held.items()) == list(records.items())
            assert len(held) == len(records)
            assert all(label in held and held[label] == records[label] for label in records)


def test_a_missing_file_is_an_empty_journal(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "records.jsonl")
    assert len(journal) == 0
    assert "a" not in journal
    assert not journal.path.exists()
    with pytest.raises(KeyError):
        journal["a"]


@given(data=st.data())
def test_a_line_cut_off_anywhere_is_dropped_and_written_again(
    make_record: MakeRecord, data: st.DataObject
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "records.jsonl"
        journal = Journal(path)
        journal.add("first", make_record([(3, 1)]))
        whole = path.stat().st_size
        journal.add("second", make_record([(3, 2)]))
        # A kill leaves any number of the second line's bytes, but not its newline.
        content = path.read_bytes()
        path.write_bytes(content[: data.draw(st.integers(whole, len(content) - 1))])

        again = Journal(path)
        assert [label for label, _ in again.items()] == ["first"]
        again.add("second", make_record([(3, 2)]))
        assert path.read_bytes() == content
