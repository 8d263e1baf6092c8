"""Read the documents of a source, from any position on.

A local source is a list of units (a file, a stretch of a jsonl file, a row group of a parquet
file), so that its order can be shuffled without holding the text and a position in it is two
numbers. A dataset on the Hub is streamed by `datasets`, whose own state is the position.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import itertools
import json
import lzma
import math
import random
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO, Any

from fastdraft_hf._errors import FastDraftError
from fastdraft_hf.data import installed
from fastdraft_hf.data.filters import KEPT, iter_kept_rows, kept_indices
from fastdraft_hf.data.sources import Source

# A document: its text, or the token ids that the target emitted.
Document = str | list[int]
Unit = Callable[[], Iterator[Document]]

_CHECKED = 10_000  # files
# Bytes of a jsonl file that are one unit: few enough to shuffle well, enough to read fast.
_STRETCH = 1 << 20


class Documents:
    """The documents of one pass over a source.

    Args:
        source: what to read.
        generated: folder of the generated sets.
        order: seed of the order of local text. Generated sets and datasets on the Hub keep theirs.

    Attributes:
        dropped: rows that the filters of a generated set left out, by reason.
    """

    def __init__(self, source: Source, generated: Path | None = None, order: str = "") -> None:
        self.dropped: dict[str, int] = {}
        self._source, self._generated, self._order = source, generated, order
        self._state: dict[str, Any] = {}
        self._stream: Any = None

    def state_dict(self) -> dict[str, Any]:
        """Return the position after the last document, as JSON data."""
        return dict(self._state) if self._stream is None else {"stream": self._stream.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Make the next iteration continue at a position that `state_dict` returned."""
        self._state = dict(state)

    def __iter__(self) -> Iterator[Document]:
        if self._source.kind == "hub":
            yield from self._hub()
            return
        units = self._units()
        random.Random(self._order).shuffle(units)
        first, skip = self._state.get("unit", 0), self._state.get("row", 0)
        for number in range(first, len(units)):
            for row, document in enumerate(units[number]()):
                if number > first or row >= skip:
                    self._state = {"unit": number, "row": row + 1}
                    yield document

    def _units(self) -> list[Unit]:
        source = self._source
        if source.kind == "generated":
            assert self._generated is not None
            folder = self._generated / source.name
            counts = kept_indices(folder)[1]
            self.dropped = {reason: n for reason, n in counts.items() if reason != KEPT}
            return [partial(_generated, folder)]
        if source.kind == "package_docs":
            units: list[Unit] = [partial(_description, n) for n in installed.licenses(source.name)]
            files = installed.package_files(source.name)
            return units + [partial(installed.docstrings, path) for path in files]
        if source.kind == "python":
            return [partial(_code, path) for path in installed.library_files()]
        if source.kind == "packages":
            return [partial(_code, path) for path in installed.package_files(source.name)]
        return [unit for path in source.matching_files() for unit in _file_units(path, source)]

    def _hub(self) -> Iterator[Document]:
        import datasets

        source = self._source
        try:
            self._stream = datasets.load_dataset(
                source.name,
                source.subset,
                data_dir=source.data_dir,
                split=source.split,
                revision=source.revision,
                streaming=True,
            )
            if self._state:
                self._stream.load_state_dict(self._state["stream"])
            for row in self._stream:
                yield _text(row, source.column, source.name)
        except FastDraftError:
            raise
        except Exception as error:  # datasets, fsspec and the Hub's client have their own types
            reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
            if "gated" in reason.lower():
                reason += "; accept its terms on the Hub and log in with `hf auth login`"
            raise FastDraftError(f"source hub '{source.name}': {reason}") from error


def _generated(folder: Path) -> Iterator[Document]:
    for row in iter_kept_rows(folder, ["prompt_ids", "completion_ids"]):
        yield row["prompt_ids"] + row["completion_ids"]


def _description(package: str) -> Iterator[str]:
    text = installed.description(package).strip()
    if text and text != "UNKNOWN":
        yield text


def _code(path: Path) -> Iterator[str]:
    try:
        yield path.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError):
        return


def _zstd(path: Path, mode: str) -> Any:
    import pyarrow as pa

    return io.BufferedReader(pa.input_stream(str(path), compression="zstd"))


# By content and not by name: a file is often compressed under another ending, or not at all.
_COMPRESSED: dict[bytes, Callable[..., Any]] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ\x00": lzma.open,
    b"\x28\xb5\x2f\xfd": _zstd,
}


def _opener(path: Path) -> Callable[..., Any]:
    with path.open("rb") as stream:
        head = stream.read(10)
    return next((o for magic, o in _COMPRESSED.items() if head.startswith(magic)), open)


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    try:
        with _opener(path)(path, "rb") as stream:
            yield stream
    except (EOFError, OSError, zlib.error, lzma.LZMAError) as error:
        raise FastDraftError(f"{path}: cannot be read to its end ({error})") from error


def _ending(path: Path) -> str:
    """Return the ending of a name in lower case, without that of its compression."""
    return Path(re.sub(r"\.(gz|bz2|xz|zst)$", "", path.name.lower())).suffix


def check_files(source: Source) -> None:
    """Refuse local files that are not text, by their first bytes.

    Raises:
        FastDraftError: naming the first such file.
    """
    # Later ones are refused when they are read: opening millions of files takes minutes.
    for path in source.matching_files()[:_CHECKED]:
        if _ending(path) != ".parquet":
            with _opened(path) as stream:
                _decoded(stream.read(1024), path, whole=False)


def _decoded(raw: bytes, path: Path, *, whole: bool = True) -> str:
    """Return UTF-8 text; a character may be cut at the end if it is not the whole file."""
    text, reason = "", ""
    try:
        text = codecs.getincrementaldecoder("utf-8-sig")().decode(raw, whole)
    except UnicodeDecodeError as error:
        reason = f"byte 0x{error.object[error.start]:02x} at {error.start}"
    if b"\0" in raw:
        reason = "a NUL byte"
    if reason:
        raise FastDraftError(
            f"{path}: not UTF-8 text ({reason}); convert the file, or leave it out with extensions"
        )
    return text


def _file_units(path: Path, source: Source) -> Iterator[Unit]:
    ending, column = _ending(path), source.column
    if ending == ".parquet":
        import pyarrow.parquet as pq

        try:
            groups = pq.ParquetFile(path).metadata.num_row_groups
        except (OSError, ValueError) as error:
            raise FastDraftError(f"{path}: not a parquet file ({error})") from error
        yield from (partial(_parquet, path, column, group) for group in range(groups))
    elif ending in (".jsonl", ".ndjson") and _opener(path) is open:
        for start in range(0, path.stat().st_size, _STRETCH):
            yield partial(_json_rows, path, column, start, start + _STRETCH)
    elif ending in (".jsonl", ".ndjson", ".json"):
        yield partial(_json_rows, path, column)
    else:
        yield partial(_whole_file, path)


def _whole_file(path: Path) -> Iterator[str]:
    with _opened(path) as stream:
        yield _decoded(stream.read(), path)


def _parquet(path: Path, column: str, group: int) -> Iterator[str]:
    import pyarrow.parquet as pq

    file = pq.ParquetFile(path)
    if column not in file.schema_arrow.names:
        raise _no_column(column, file.schema_arrow.names, str(path))
    for batch in file.iter_batches(row_groups=[group], columns=[column]):
        for row in batch.to_pylist():
            yield _text(row, column, str(path))


def _json_rows(path: Path, column: str, start: int = 0, end: float = math.inf) -> Iterator[str]:
    """Yield the texts of the lines that begin from byte ``start`` to before ``end``."""
    with _opened(path) as stream:
        position = start
        if start:
            stream.seek(start - 1)
            position += len(stream.readline()) - 1  # the end of a line that began before
        for line in stream:
            if position >= end:
                return
            if position == 0 and line.lstrip().startswith(b"["):  # one array of rows
                line += stream.read()
            if line.strip():
                try:
                    found = json.loads(line)
                except ValueError as error:
                    number = _line_number(path, position)
                    raise FastDraftError(f"{path}:{number}: not valid JSON ({error})") from error
                for row in found if isinstance(found, list) else [found]:
                    yield _text(row, column, str(path))
            position += len(line)


def _line_number(path: Path, position: int) -> int:
    """Return the number of the line that begins at a byte of a file."""
    with _opened(path) as stream:
        ends = itertools.accumulate(map(len, stream))
        return next(number for number, end in enumerate(ends, 1) if end > position)


def _text(row: Any, column: str, where: str) -> str:
    if not isinstance(row, dict):
        raise FastDraftError(f"{where}: a row is not a mapping of columns")
    if column in row and row[column] is None:  # an empty cell, which is dropped and counted
        return ""
    if not isinstance(row.get(column), str):
        raise _no_column(column, row, where)
    return str(row[column])


def _no_column(column: str, names: Iterable[str], where: str) -> FastDraftError:
    return FastDraftError(
        f"{where}: column '{column}' is missing or not text; it has: "
        f"{', '.join(itertools.islice(names, 20))}"
    )
