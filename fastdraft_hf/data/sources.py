"""Sources of training text: their settings, their checks, and their documents from any position on.

A local source is a list of units (a file, a package's page, a generated set). Their order is
shuffled, and a position is two numbers. A dataset on the Hub is streamed by `datasets`, whose own
state is the position.
"""

import codecs
import glob
import io
import json
import random
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import IO, Any, Literal

from pydantic import Field

from fastdraft_hf._config import Number, Section
from fastdraft_hf._errors import FastDraftError
from fastdraft_hf.data import installed
from fastdraft_hf.data.filters import iter_kept_rows

# A document: its text, or the token ids that the target emitted.
Document = str | list[int]

_CHECKED = 10_000  # files
# Bytes of a document or line, which take about 40 times as much while they are encoded; and of a
# JSON array.
_LONGEST, _LONGEST_ARRAY = 1 << 26, 1 << 30


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
        gt=0,
        description=(
            "share of the token budget, relative to the other sources; align reads every row"
        ),
    )
    data_dir: str | None = Field(
        None, description="hub: the folder inside the dataset, such as data/python"
    )
    revision: str | None = Field(None, description="hub: branch, tag or commit of the dataset")

    def check_values(self) -> None:
        if self.kind in ("generated", "files", "hub") and not self.name:
            raise FastDraftError(f"name: needed for kind {self.kind}")


def matching_files(name: str) -> list[Path]:
    """Return the files that a name stands for (a file, a folder or a glob), sorted."""
    # Of a folder without what is hidden in it, such as ``.git``.
    folder = f"{glob.escape(name)}/**" if Path(name).is_dir() else name
    return sorted(p for p in map(Path, glob.glob(folder, recursive=True)) if p.is_file())


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
        files = matching_files(source.name)
        if not files:
            raise FastDraftError(f"{path}.name: no file matches '{source.name}'")
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
    """

    def __init__(self, source: Source, generated: Path | None = None, order: str = "") -> None:
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

    def _units(self) -> list[Callable[[], Iterator[Document]]]:
        source = self._source
        if source.kind == "generated":
            assert self._generated is not None
            return [partial(_generated, self._generated / source.name)]
        if source.kind == "package_docs":
            pages = [partial(_description, name) for name in installed.licenses(source.name)]
            files = installed.package_files(source.name)
            return [*pages, *(partial(installed.docstrings, path) for path in files)]
        if source.kind == "python":
            return [partial(_code, path) for path in installed.library_files()]
        if source.kind == "packages":
            return [partial(_code, path) for path in installed.package_files(source.name)]
        return [partial(_file, path, source.column) for path in matching_files(source.name)]

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


def _ending(path: Path) -> str:
    """Return the ending of a name in lower case, without that of its compression."""
    return Path(re.sub(r"\.(gz|bz2|zst)$", "", path.name.lower())).suffix


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    import pyarrow as pa

    try:
        with io.BufferedReader(pa.input_stream(str(path), compression="detect")) as stream:
            yield stream
    except OSError as error:
        raise FastDraftError(f"{path}: cannot be read to its end ({error})") from error


def _limited(size: int, where: Path | str, most: int | None = None) -> None:
    if size > (most := most or _LONGEST):
        raise FastDraftError(f"{where}: more than {most >> 20} MiB in one piece; split it")


def _decoded(raw: bytes, path: Path, *, whole: bool = True) -> str:
    """Return UTF-8 text; a character may be cut at the end if it is not the whole file."""
    try:
        text = codecs.getincrementaldecoder("utf-8-sig")().decode(raw, whole)
        reason = "a NUL byte" if "\0" in text else ""
    except UnicodeDecodeError as error:
        text, reason = "", f"byte 0x{error.object[error.start]:02x} at {error.start}"
    if reason:
        raise FastDraftError(
            f"{path}: not UTF-8 text ({reason}); convert the file, or leave it out with a glob "
            "such as **/*.md"
        )
    return text


def _file(path: Path, column: str) -> Iterator[str]:
    if _ending(path) == ".parquet":
        rows: Iterable[Any] = _parquet_rows(path, column)
    elif _ending(path) in (".jsonl", ".ndjson", ".json"):
        rows = json_rows(path)
    else:
        with _opened(path) as stream:
            raw = stream.read(_LONGEST + 1)
        _limited(len(raw), path)
        yield _decoded(raw, path)
        return
    for row in rows:
        yield _text(row, column, str(path))


def _parquet_rows(path: Path, column: str) -> Iterator[Any]:
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
        # The column exists.
        _text(dict.fromkeys(file.schema_arrow.names, ""), column, str(path))
        # One by one: several rows could repeat one huge cell of the file's dictionary.
        for number, row in enumerate(file.iter_batches(1, columns=[column]), 1):
            _limited(row.nbytes, f"{path}:{number}")
            yield from row.to_pylist()
    except FastDraftError:
        raise
    except (OSError, ValueError, MemoryError, NotImplementedError) as error:
        reason = " ".join(str(error).split())[:200]
        raise FastDraftError(f"{path}: not a parquet file, or damaged ({reason})") from error


def json_rows(path: Path) -> Iterator[Any]:
    """Yield the row of every line, or those of one array."""
    with _opened(path) as stream:
        for number, line in enumerate(iter(lambda: stream.readline(_LONGEST + 1), b""), 1):
            if number == 1 and line.lstrip().startswith(b"["):
                line += stream.read(_LONGEST_ARRAY + 1)
                _limited(len(line), path, _LONGEST_ARRAY)
            else:
                _limited(len(line), f"{path}:{number}")
            if line.strip():
                try:
                    found = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise FastDraftError(f"{path}:{number}: not valid JSON ({error})") from error
                yield from found if isinstance(found, list) else [found]


def _text(row: Any, column: str, where: str) -> str:
    if not isinstance(row, dict):
        raise FastDraftError(f"{where}: a row is not a mapping of columns")
    if column in row and row[column] is None:  # an empty cell, which is dropped and counted
        return ""
    if not isinstance(row.get(column), str):
        raise FastDraftError(
            f"{where}: column '{column}' is missing or not text; it has: "
            f"{', '.join(islice(row, 20))}"
        )
    return str(row[column])
