"""The sources of training text: their checks, and documents of every kind from any position."""

import bz2
import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fastdraft_hf._errors import FastDraftError
from fastdraft_hf.data import sources
from fastdraft_hf.data.sources import (
    Documents,
    Source,
    check_source,
    matching_files,
    summary_keys,
)

ROWS = b'{"text": "one", "n": 1}\n\n{"text": "two", "n": 2}'
FORMS = {
    "rows.JSONL": ROWS,
    "rows.ndjson": ROWS,
    "array.json": b'[{"text": "one"},\n {"text": "two"}]',
    "rows.json.gz": gzip.compress(ROWS),
    "rows.jsonl.bz2": bz2.compress(ROWS),
    "rows.jsonl.zst": pa.compress(ROWS, codec="zstd", asbytes=True),
}


def parquet(*texts: str) -> bytes:
    """Return a file whose footer, in its last bytes, is read before the rows."""
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"text": texts}), sink)
    return bytes(sink.getvalue())


def local(path: Path, **fields: Any) -> Source:
    return Source(kind="files", name=str(path), **fields)


def write_jsonl(path: Path, texts: list[str]) -> Source:
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts), encoding="utf-8")
    return local(path)


@pytest.mark.parametrize("name", FORMS)
def test_rows_in_every_form(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(FORMS[name])
    source = local(tmp_path / name)
    check_source(source, "pretrain.sources[0]", [])
    assert list(Documents(source)) == ["one", "two"]


def test_a_folder_of_everything(tmp_path: Path) -> None:
    pq.write_table(pa.table({"body": ["p1", "p2", None]}), tmp_path / "a.parquet")
    (tmp_path / "b.jsonl").write_text('{"body": "j1"}\n')
    (tmp_path / "c.py").write_text("code = 1\n")
    (tmp_path / "d.txt.gz").write_bytes(gzip.compress(b"\xef\xbb\xbftext"))
    source = local(tmp_path, column="body")
    found = list(Documents(source, order="a"))
    # An empty cell is an empty text, which is dropped and counted later.
    assert Counter(found) == Counter(["", "code = 1\n", "text", "j1", "p1", "p2"])
    assert found == list(Documents(source, order="a"))
    orders = {tuple(Documents(source, order=str(n))) for n in range(9)}
    assert len(orders) > 1


@pytest.mark.parametrize(
    ("name", "raw", "message"),
    [
        ("a.jsonl", b'{"txt": "a", "n": 1}', r"column 'text' is missing .*; it has: txt, n"),
        ("a.jsonl", b'{"text": 3, "n": 1}', r"column 'text' is .*not text; it has: text, n"),
        ("a.jsonl", b"3", r"a row is not a mapping"),
        ("a.jsonl", b'{"text": "a"}\n\n{"text": "b"}\n{"text": \n', r"jsonl:4: not valid JSON"),
        ("cut.jsonl.gz", gzip.compress(ROWS[:23] * 99, mtime=0)[:-9], r"cannot be read to its end"),
        ("plain.jsonl.gz", ROWS, r"cannot be read to its end"),
        ("deep.jsonl", b'{"text": ' + b"[" * 100_000, r"jsonl:1: not valid JSON"),
        ("a.parquet", b"text", r"not a parquet file"),
        ("cut.parquet", parquet("a")[:40] + parquet("b" * 99)[40:], r"or damaged"),
        ("late.txt", b"x" * 5000 + b"\xff", r"not UTF-8 text \(byte 0xff at 5000\)"),
    ],
)
def test_what_is_refused_while_reading(tmp_path: Path, name: str, raw: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(FastDraftError, match=rf"{name}:? ?.*{message}|{message}") as caught:
        list(Documents(local(tmp_path / name)))
    assert str(tmp_path / name) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "raw"),
    [
        ("a.txt", b"x" * 101),
        ("bomb.txt.gz", gzip.compress(b"x" * 10**7, mtime=0)),
        ("a.jsonl:2", b'{"text": "a"}\n{"text": "%s"}\n' % (b"x" * 99)),
        ("a.parquet:2", parquet("a", "b" * 999, "c")),
        ("a.json", b"[%s1]" % (b"1,\n" * 99)),
    ],
)
def test_what_is_too_long(
    tmp_path: Path, name: str, raw: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "_LONGEST", 100)
    monkeypatch.setattr(sources, "_LONGEST_ARRAY", 200)
    path = tmp_path / name.partition(":")[0]
    path.write_bytes(raw)
    with pytest.raises(FastDraftError, match=f"{name}: more than .* in one piece; split it"):
        list(Documents(local(path)))


@pytest.mark.parametrize(
    ("name", "raw"),
    [
        ("picture.png", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"),
        ("utf16.txt", "Grüße aus Köln.".encode("utf-16")),
        ("latin.jsonl", '{"text": "Köln"}'.encode("latin-1")),
        ("archive.tar.gz", gzip.compress(b"name\0\0", mtime=0)),
    ],
)
def test_what_is_refused_before_any_work(tmp_path: Path, name: str, raw: bytes) -> None:
    (tmp_path / "good.txt").write_text("ü" * 600)  # a character may be cut by the check
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(FastDraftError, match=rf"{name}: not UTF-8 text .*; convert the file"):
        check_source(local(tmp_path), "pretrain.sources[0]", [])
    check_source(local(tmp_path / "good*"), "pretrain.sources[0]", [])


def test_a_parquet_file_without_the_column(tmp_path: Path) -> None:
    pq.write_table(pa.table({"body": ["p1"]}), tmp_path / "a.parquet")
    with pytest.raises(FastDraftError, match=r"a\.parquet: column 'text' .*it has: body"):
        list(Documents(local(tmp_path / "a.parquet")))


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Source]:
    """Sources of several kinds. `datasets` opens a folder like a dataset on the Hub."""
    folder = tmp_path_factory.mktemp("corpora")
    texts = [f"text {number} {'x' * (number % 7)}" for number in range(60)]
    (folder / "hub").mkdir()
    for part in range(3):
        rows = pa.table({"text": texts[part::3]})
        pq.write_table(rows, folder / "hub" / f"train-{part}.parquet", row_group_size=7)
    (folder / "tree").mkdir()
    for number, text in enumerate(texts):
        (folder / "tree" / f"{number}.txt").write_text(text)
    return {
        "hub": Source(kind="hub", name=str(folder / "hub")),
        "jsonl": write_jsonl(folder / "a.jsonl", texts),
        "tree": local(folder / "tree"),
        "parquet": local(folder / "hub" / "*.parquet"),
    }


@pytest.mark.parametrize("kind", ["hub", "jsonl", "tree", "parquet"])
def test_resuming_at_any_position(corpora: dict[str, Source], kind: str) -> None:
    documents = Documents(corpora[kind], order="a")
    whole, states = [], []
    for document in documents:
        whole.append(document)
        states.append(json.loads(json.dumps(documents.state_dict())))
    assert len(set(map(str, whole))) == len(whole) == 60
    for number in range(0, 60, 4):
        resumed = Documents(corpora[kind], order="a")
        resumed.load_state_dict(states[number])
        assert list(resumed) == whole[number + 1 :]


@pytest.mark.parametrize("name", ["empty", "nowhere"])
def test_a_dataset_that_is_not_there(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(FastDraftError, match=rf"^source hub '.*{name}': "):
        list(Documents(Source(kind="hub", name=str(tmp_path / name))))


def test_a_gated_dataset_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def refuse(*args: Any, **given: Any) -> None:
        assert given["revision"] == "v1"
        raise OSError("Dataset 'x/y' is a gated dataset on the Hub.")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(FastDraftError, match=r"gated dataset.*accept its terms .*hf auth login"):
        list(Documents(Source(kind="hub", name="x/y", revision="v1")))


def test_sources_are_checked_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(FastDraftError, match=r"^pretrain\.sources\[0\]\.name: no file matches"):
        check_source(Source(kind="files", name=str(tmp_path / "*.txt")), "pretrain.sources[0]", [])
    with pytest.raises(FastDraftError, match="has no set 'b'; it has: a"):
        check_source(Source(name="b"), "align.sources[0]", ["a"])
    with pytest.raises(FastDraftError, match="it has: none"):
        check_source(Source(name="b"), "align.sources[0]", [])
    check_source(Source(name="a"), "align.sources[0]", ["a"])
    check_source(Source(kind="python"), "pretrain.sources[0]", [])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "files"}, "name: needed for kind files"),
        ({"kind": "python", "weight": 0}, "weight: must be above 0, got 0"),
    ],
)
def test_sources_refuse_nonsense(fields: dict, message: str) -> None:
    with pytest.raises(FastDraftError, match=f"^{message}"):
        Source(**fields)


def test_hidden_files_of_a_folder_are_left_out(tmp_path: Path) -> None:
    for name in ("a.py", "sub/c.py", "sub/.hidden/d.py", ".git/e.py", "f.jsonl.gz"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")

    def names(path: Path) -> list[str]:
        return [str(p.relative_to(tmp_path)) for p in matching_files(local(path).name)]

    assert names(tmp_path) == ["a.py", "f.jsonl.gz", "sub/c.py"]
    assert names(tmp_path / "**" / "*.py") == ["a.py", "sub/c.py"]


def test_names_in_a_summary_are_different() -> None:
    sources = [Source(name="a"), Source(kind="python"), Source(name="a"), Source(name="a")]
    assert summary_keys(sources) == ["a", "python", "a #2", "a #3"]
