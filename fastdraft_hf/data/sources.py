"""Sources of training text: their settings, their checks, and their documents from any position on.

A local source is a list of units (a file, a stretch of a jsonl file, a row group of a parquet
file), so that its order can be shuffled without holding the text and a position in it is two
numbers. A dataset on the Hub is streamed by `datasets`, whose own state is the position.
"""

from __future__ import annotations

import bz2
import codecs
import glob
import gzip
import io
import itertools
import json
import lzma
import math
import random
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO, Any, Literal

from pydantic import Field

from fastdraft_hf._config import Number, Section
from fastdraft_hf._errors import FastDraftError
from fastdraft_hf.data import installed
from fastdraft_hf.data.filters import KEPT, iter_kept_rows, kept_indices

# A document: its text, or the token ids that the target emitted.
Document = str | list[int]
Unit = Callable[[], Iterator[Document]]

_CHECKED = 10_000  # files
# Bytes of a jsonl file that are one unit: few enough to shuffle well, enough to read fast.
_STRETCH = 1 << 20


class Source(Section):
    """One source of training text."""

    kind: Literal["generated", "python", "packages", "package_docs", "files", "hub"] = Field(
        "generated",
        description=(
            "generated: a set of stage generate; python: the standard library's source; packages: "
            "Python source of installed packages; package_docs: their descriptions and docstrings; "
            "files: local text, code, jsonl, json or parquet; hub: a dataset on the Hub"
        ),
    )
    name: str = Field(
        "",
        description=(
            "the set's name; a path, folder or glob; a dataset id; packages: a glob of their names"
        ),
    )
    subset: str | None = Field(None, description="hub: the dataset's configuration")
    split: str = Field("train", description="hub: the split")
    column: str = Field(
        "text", description="jsonl, json, parquet, hub: the column that holds the text"
    )
    weight: Number = Field(
        1.0,
        description=(
            "share of the token budget, relative to the other sources; align reads every row"
        ),
    )
    data_dir: str | None = Field(
        None, description="hub: the folder inside the dataset, such as data/python"
    )
    revision: str | None = Field(None, description="hub: branch, tag or commit of the dataset")
    extensions: list[str] = Field(
        [], description="files: only names with these endings, such as [.py, .md]; empty for all"
    )

    def check_values(self) -> None:
        if self.weight <= 0:
            raise FastDraftError(f"weight: must be above 0, got {self.weight}")
        if self.kind in ("generated", "files", "hub") and not self.name:
            raise FastDraftError(f"name: needed for kind {self.kind}")
        if self.extensions and self.kind != "files":
            raise FastDraftError(f"extensions: for kind files only, not {self.kind}")

    def matching_files(self) -> list[Path]:
        """Return the files that ``name`` stands for (a file, a folder or a glob), sorted."""
        folder = Path(self.name)
        if folder.is_dir():  # without what is hidden in it, such as ``.git``
            names = [f"{folder}/{n}" for n in glob.glob("**", root_dir=folder, recursive=True)]
        else:
            names = glob.glob(self.name, recursive=True)
        endings = tuple(self.extensions) or ""
        return sorted(p for p in map(Path, names) if p.name.endswith(endings) and p.is_file())


def check_source(source: Source, path: str, generated_sets: Iterable[str]) -> None:
    """Refuse a source that cannot be read, by names and by the first bytes of local files.

    Args:
        source: what to check.
        path: its key in the recipe, for errors.
        generated_sets: names of the sets that stage generate makes.

    Raises:
        FastDraftError: naming ``path``, or the first file that is not text.
    """
    if source.kind == "generated":
        known = list(generated_sets)
        if source.name not in known:
            raise FastDraftError(
                f"{path}.name: generate has no set '{source.name}'; it has: "
                f"{', '.join(known) or 'none'}"
            )
    elif source.kind == "files":
        files = source.matching_files()
        if not files:
            which = f" with {', '.join(source.extensions)}" if source.extensions else ""
            raise FastDraftError(f"{path}.name: no file matches '{source.name}'{which}")
        # Later ones are refused when they are read: opening millions of files takes minutes.
        for file in files[:_CHECKED]:
            if _ending(file) != ".parquet":
                with _opened(file) as stream:
                    _decoded(stream.read(1024), file, whole=False)


def summary_keys(sources: Sequence[Source]) -> list[str]:
    """Return a name for every source; one that occurs again is numbered."""
    keys: list[str] = []
    for source in sources:
        name = source.name or source.kind
        again = sum(key == name or key.startswith(f"{name} #") for key in keys)
        keys.append(f"{name} #{again + 1}" if again else name)
    return keys


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
