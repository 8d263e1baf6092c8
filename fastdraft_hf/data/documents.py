"""The texts of a source, from any place in it on: what is read, in which order, where one stands.

A local source is a list of units (a file, a stretch of a jsonl file, a row group of a parquet
file), so that its order can be shuffled without holding the text, and a place in it is two numbers.
A set of the Hub is streamed through `datasets`, whose own state is the place.
"""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastdraft_hf._errors import FastDraftError
from fastdraft_hf.data import installed, python_source
from fastdraft_hf.data.filters import read_kept_rows
from fastdraft_hf.data.sources import Source

# A stretch of a jsonl file: small enough to shuffle well, large enough to read fast.
_STRETCH = 1 << 20

# A document: its text, or the token ids the target wrote.
Document = str | list[int]
Place = dict[str, Any]


@dataclass(frozen=True)
class _Unit:
    path: Path
    start: int = 0
    end: int | None = None  # of a jsonl file: bytes; of a parquet file: row groups
    read: str = "file"


@dataclass
class DocumentReader:
    """One pass over a source, in an order given by a seed, from a place on.

    Iterating yields documents; `place` is what `seek` of another reader takes to go on after the
    document that was yielded last.

    Args:
        source: what is read.
        generated: folder of the generated sets.
        order: seed of the order of local text; ``None`` leaves it in one fixed mixed order. A set
            of the Hub always keeps its own order.
        rank, world: this process gets every ``world``-th document, from the ``rank``-th on.
    """

    source: Source
    generated: Path | None = None
    order: str | None = None
    rank: int = 0
    world: int = 1
    place: Place = field(default_factory=dict)
    # Rows that were left out before they became documents, with reasons.
    dropped: dict[str, int] = field(default_factory=dict)

    def seek(self, place: Place) -> None:
        """Go on after the document that ``place`` was taken at."""
        self.place = settled(place)

    def __iter__(self) -> Iterator[Document]:
        if self.source.kind == "hub":
            yield from self._hub()
            return
        units, read = self._units()
        random.Random(f"{self.order}").shuffle(units)
        # By the number of a document and not by files: exact, and even whatever the files' sizes.
        number = int(self.place.get("number", 0))
        first, skip = int(self.place.get("unit", 0)), int(self.place.get("row", 0))
        for index in range(first, len(units)):
            for row, document in enumerate(read(units[index])):
                if index == first and row < skip:
                    continue
                number += 1
                if (number - 1) % self.world != self.rank:
                    continue
                self.place = {"unit": index, "row": row + 1, "number": number}
                yield document

    def _units(self) -> tuple[list[Any], Callable[[Any], Iterator[Document]]]:
        source = self.source
        if source.kind == "generated":
            assert self.generated is not None
            rows, reasons = read_kept_rows(self.generated / source.name)
            self.dropped = {name: n for name, n in reasons.items() if name != "kept"}
            return rows, lambda row: iter([row["prompt_ids"] + row["completion_ids"]])
        if source.kind == "package_docs":
            names: list[Any] = [name for name, _, _ in installed.packages(source.name)[0]]
            return [*names, *installed.source_files(source.name)], _package_docs
        if source.kind in ("python", "packages"):
            files = (
                python_source.source_files()
                if source.kind == "python"
                else installed.source_files(source.name)
            )
            return list(files), _code
        units = [unit for path in source.matching_files() for unit in _units_of(path)]
        return units, lambda unit: _read_unit(unit, source.column)

    def _hub(self) -> Iterator[Document]:
        source = self.source
        stream = open_hub(source)
        if self.world > 1:
            from datasets.distributed import split_dataset_by_node

            stream = split_dataset_by_node(stream, rank=self.rank, world_size=self.world)
        if self.place:
            stream.load_state_dict(self.place["stream"])
        rows = iter(stream)
        while True:
            try:
                row = next(rows)
            except StopIteration:
                return
            except Exception as error:  # whatever the network gives, after the library's retries
                raise _hub_error(source, error) from error
            # A function and not the state itself: it is copied only where somebody keeps it.
            self.place = _LazyPlace(stream)
            yield _column(row, source.column, source.name)


class _LazyPlace(dict[str, Any]):
    """The place in a stream; `settle` copies it."""

    def __init__(self, stream: Any) -> None:
        super().__init__()
        self._stream = stream

    def settle(self) -> Place:
        return {"stream": self._stream.state_dict()}


def settled(place: Place) -> Place:
    """Return a place as plain data that stays as it is when reading goes on."""
    return place.settle() if isinstance(place, _LazyPlace) else dict(place)


def open_hub(source: Source) -> Any:
    """Open a dataset of the Hub as a stream.

    Raises:
        FastDraftError: there is no such dataset, subset or split, it is gated, or the Hub is out
            of reach.
    """
    import datasets

    try:
        return datasets.load_dataset(
            source.name,
            source.subset,
            data_dir=source.data_dir,
            split=source.split,
            streaming=True,
        )
    except Exception as error:  # each of datasets, fsspec, httpx and the Hub's client has its own
        raise _hub_error(source, error) from error


def _hub_error(source: Source, error: Exception) -> FastDraftError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
    if "gated" in reason.lower():
        reason += "; accept its terms on the Hub and log in with `hf auth login`"
    return FastDraftError(f"source hub '{source.name}': {reason}")


def documents(source: Source) -> Iterator[str]:
    """Yield the texts of a source that is not generated, in its fixed order."""
    if source.kind == "generated":
        raise ValueError(f"{source.kind} holds no documents")
    for document in DocumentReader(source):
        assert isinstance(document, str)
        yield document


def _code(path: Path) -> Iterator[str]:
    try:
        yield path.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError):
        return


def _package_docs(unit: Any) -> Iterator[str]:
    if isinstance(unit, str):
        text = installed.description(unit).strip()
        if text and text != "UNKNOWN":
            yield text
    else:
        yield from installed.docstrings(unit)


def _units_of(path: Path) -> Iterator[_Unit]:
    if path.suffix == ".parquet":
        import pyarrow.parquet as pq

        try:
            groups = pq.ParquetFile(path).metadata.num_row_groups
        except (OSError, ValueError) as error:
            raise FastDraftError(f"{path}: no parquet file ({error})") from error
        yield from (_Unit(path, group, group + 1, "parquet") for group in range(groups))
    elif path.suffix == ".jsonl":
        for start in range(0, path.stat().st_size, _STRETCH):
            yield _Unit(path, start, start + _STRETCH, "jsonl")
    elif path.name.endswith(".jsonl.gz"):
        yield _Unit(path, read="jsonl.gz")
    else:
        yield _Unit(path)


def _read_unit(unit: _Unit, column: str) -> Iterator[str]:
    path = unit.path
    if unit.read == "file":
        yield path.read_text(encoding="utf-8", errors="replace")
    elif unit.read == "parquet":
        import pyarrow.parquet as pq

        file = pq.ParquetFile(path)
        names = file.schema_arrow.names
        if column not in names:
            raise _no_column(column, names, str(path))
        for batch in file.iter_batches(row_groups=[unit.start], columns=[column]):
            for row in batch.to_pylist():
                yield _column(row, column, str(path))
    else:
        lines = _gz_lines(path) if unit.read == "jsonl.gz" else _stretch_lines(unit)
        for place, line in lines:
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise FastDraftError(
                    f"{path}:{_line_number(path, place)}: no valid JSON ({error})"
                ) from error
            yield _column(row, column, str(path))


def _stretch_lines(unit: _Unit) -> Iterator[tuple[int, bytes]]:
    """Yield the lines that begin in a stretch of a file, and where."""
    assert unit.end is not None
    with unit.path.open("rb") as stream:
        if unit.start:
            stream.seek(unit.start - 1)
            stream.readline()  # the rest of a line that began before
        while (place := stream.tell()) < unit.end:
            line = stream.readline()
            if not line:
                return
            yield place, line


def _gz_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    place = 0
    with gzip.open(path, "rb") as stream:
        for line in stream:
            yield place, line
            place += len(line)


def _line_number(path: Path, place: int) -> int:
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rb") as stream:
        return 1 + sum(
            stream.read(min(_STRETCH, place - start)).count(b"\n")
            for start in range(0, place, _STRETCH)
        )


def _column(row: Any, column: str, where: str) -> str:
    if not isinstance(row, dict):
        raise FastDraftError(f"{where}: a line is no mapping of columns")
    if column in row and row[column] is None:  # an empty cell; it is dropped and counted
        return ""
    if not isinstance(row.get(column), str):
        raise _no_column(column, list(row), where)
    return str(row[column])


def _no_column(column: str, names: Sequence[str], where: str) -> FastDraftError:
    return FastDraftError(
        f"{where}: column '{column}' is missing or no text; it has: {', '.join(names)}"
    )
