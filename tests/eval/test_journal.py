import tempfile
from collections.abc import Callable
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from fastdraft_hf.decode.records import DecodingRecord, DecodingRecords
from fastdraft_hf.eval.expected import TextAcceptance
from fastdraft_hf.eval.journal import Journal

READING = TextAcceptance((0.5,), (1.0,), (0.0,))


@given(data=st.data())
def test_a_line_cut_off_anywhere_is_dropped_and_written_again(
    make_record: Callable[..., DecodingRecord], data: st.DataObject
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "records.jsonl"
        journal = Journal(path)
        journal.add("first", make_record([(3, 1)]), READING)
        kept = path.stat().st_size
        journal.add("second", make_record([(3, 2)]))
        # A kill leaves any number of the second line's bytes, but not its newline.
        content = path.read_bytes()
        path.write_bytes(content[: data.draw(st.integers(kept, len(content) - 1))])
        # Another process reads the file as it is; its owner repairs it.
        other = Journal(Path(folder) / "other.jsonl", [path])
        assert list(other) == ["first"]
        again = Journal(path)
        assert list(again) == ["first"]
        assert again.readings == other.readings == {"first": READING}
        again.add("second", make_record([(3, 2)]))
        assert path.read_bytes() == content


def test_other_files_are_read_and_not_written(
    make_record: Callable[..., DecodingRecord], tmp_path: Path
) -> None:
    names = [tmp_path / f"records-{rank}.jsonl" for rank in range(2)]
    Journal(names[0]).add("a", make_record([(3, 1)]), READING)
    both = Journal(names[1], names)
    both.add("b", make_record([(3, 2)]))
    assert names[1].read_text(encoding="utf-8").count("\n") == 1
    both.write(tmp_path / "records.jsonl", ["b", "a"])
    merged = Journal(tmp_path / "records.jsonl")
    assert (list(merged), dict(merged), merged.readings) == (["b", "a"], both, both.readings)
    assert DecodingRecords.load(merged.path) == list(merged.values())
