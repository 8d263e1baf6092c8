"""Results kept on disk as they are made, so that a killed run resumes where it stopped."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Generic, TypeVar

from fastdraft_hf._atomic import write_text
from fastdraft_hf.decode.records import DecodingRecord

T = TypeVar("T")


class Journal(Mapping[str, T], Generic[T]):
    """A growing JSON-lines file of labelled results, dataclass instances of one type.

    Args:
        path: the file, appended to. Its content is read; a line that a kill cut off is dropped.
        others: further files to read, of other processes or of an earlier start.
        read: makes a result from its fields.
    """

    def __init__(
        self,
        path: Path,
        others: Iterable[Path] = (),
        read: Callable[[dict[str, Any]], Any] = DecodingRecord.from_dict,
    ) -> None:
        self.path = path
        self._results: dict[str, T] = {}
        if path.exists():
            content = path.read_bytes()
            good = content[: content.rfind(b"\n") + 1]
            if good != content:
                path.write_bytes(good)
        for file in dict.fromkeys([*others, path]):
            if file.exists():
                content = file.read_bytes()
                for line in content[: content.rfind(b"\n") + 1].decode("utf-8").splitlines():
                    data = json.loads(line)
                    self._results[data["label"]] = read(data["record"])

    def __getitem__(self, label: str) -> T:
        return self._results[label]

    def __iter__(self) -> Iterator[str]:
        return iter(self._results)

    def __len__(self) -> int:
        return len(self._results)

    def add(self, label: str, result: T) -> None:
        """Keep ``result`` under ``label``; it is on disk when this returns."""
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(_line(label, result))
            stream.flush()
            os.fsync(stream.fileno())
        self._results[label] = result

    def write(self, path: Path, labels: Iterable[str]) -> None:
        """Write some results to a file of their own, in the order of ``labels``."""
        write_text(path, "".join(_line(label, self._results[label]) for label in labels))


def _line(label: str, result: Any) -> str:
    return json.dumps({"label": label, "record": dataclasses.asdict(result)}) + "\n"
