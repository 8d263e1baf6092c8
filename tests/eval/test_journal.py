from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from fastdraft_hf.decode.records import DecodingRecord
from fastdraft_hf.eval.expected import TextAcceptance
from fastdraft_hf.eval.journal import Journal

MakeRecord = Callable[..., DecodingRecord]


@given(data=st.data())
def test_a_line_cut_off_anywhere_is_dropped_and_written_again(
    make_record: MakeRecord, data: st.DataObject
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "records.jsonl"
        journal: Journal[DecodingRecord] = Journal(path)
        journal.add("first", make_record([(3, 1)]))
        kept = path.stat().st_size
        journal.add("second", make_record([(3, 2)]))
        # A kill leaves any number of the second line's bytes, but not its newline.
        content = path.read_bytes()
        path.write_bytes(content[: data.draw(st.integers(kept, len(content) - 1))])
        # Another process reads the file as it is; its owner repairs it.
        assert list(Journal[Any](Path(folder) / "other.jsonl", [path])) == ["first"]
        again: Journal[DecodingRecord] = Journal(path)
        assert list(again) == ["first"]
        again.add("second", make_record([(3, 2)]))
        assert path.read_bytes() == content


def test_other_files_are_read_and_not_written(tmp_path: Path) -> None:
    text = TextAcceptance((0.5,), (1.0,), (0.0,))
    names = [tmp_path / f"readings-{rank}.jsonl" for rank in range(2)]
    one: Journal[TextAcceptance] = Journal(names[0], read=TextAcceptance.from_dict)
    one.add("a", text)
    both: Journal[TextAcceptance] = Journal(names[1], names, TextAcceptance.from_dict)
    both.add("b", text)
    assert dict(both) == {"a": text, "b": text}
    assert names[1].read_text(encoding="utf-8").count("\n") == 1
    both.write(tmp_path / "readings.jsonl", ["b", "a"])
    whole: Journal[TextAcceptance] = Journal(
        tmp_path / "readings.jsonl", read=TextAcceptance.from_dict
    )
    assert list(whole) == ["b", "a"]
