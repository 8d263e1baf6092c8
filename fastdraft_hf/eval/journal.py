"""Answers kept on disk as they are made: a killed run resumes with those that are missing."""

import dataclasses
import json
import os
from collections.abc import Iterable
from pathlib import Path

from fastdraft_hf._atomic import write_text
from fastdraft_hf.decode.records import DecodingRecord
from fastdraft_hf.eval.expected import TextAcceptance


class Journal(dict[str, DecodingRecord]):
    """Records by label, in a JSON-lines file that `add` appends to.

    ``readings`` holds the expected acceptance of those answers that have one. A line that a kill
    cut off is dropped. ``others`` are read too: files of other processes or of an earlier start.
    """

    def __init__(self, path: Path, others: Iterable[Path] = ()) -> None:
        super().__init__()
        self.path = path
        self.readings: dict[str, TextAcceptance] = {}
        for file in dict.fromkeys([*others, path]):
            content = file.read_bytes() if file.exists() else b""
            complete = content[: content.rfind(b"\n") + 1]
            if file == path and complete != content:
                os.truncate(path, len(complete))
            for row in map(json.loads, complete.splitlines()):
                self[row["label"]] = DecodingRecord.from_dict(row["record"])
                if "reading" in row:
                    reading = TextAcceptance(*map(tuple, row["reading"].values()))
                    self.readings[row["label"]] = reading

    def add(
        self, label: str, record: DecodingRecord, reading: TextAcceptance | None = None
    ) -> None:
        """Keep an answer; it is on disk when this returns."""
        self[label] = record
        if reading is not None:
            self.readings[label] = reading
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(self._line(label))
            stream.flush()
            os.fsync(stream.fileno())

    def write(self, path: Path, labels: Iterable[str]) -> None:
        """Write some answers to a file of their own, in the order of ``labels``."""
        write_text(path, "".join(map(self._line, labels)))

    def _line(self, label: str) -> str:
        row = {"label": label, "record": dataclasses.asdict(self[label])}
        if label in self.readings:
            row["reading"] = dataclasses.asdict(self.readings[label])
        return json.dumps(row) + "\n"
