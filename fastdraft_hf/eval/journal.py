"""Records kept as they come, one JSON line each, so that a killed run goes on where it was."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path

from fastdraft_hf.decode.records import DecodingRecord


class Journal:
    """A growing file of labelled records.

    Args:
        path: the file; what it holds is read, a line cut off by a kill is dropped.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._records: dict[str, DecodingRecord] = {}
        if path.exists():
            whole = path.read_bytes()
            good = whole[: whole.rfind(b"\n") + 1]
            if good != whole:
                path.write_bytes(good)
            for line in good.decode("utf-8").splitlines():
                data = json.loads(line)
                self._records[data["label"]] = DecodingRecord.from_dict(data["record"])

    def __contains__(self, label: str) -> bool:
        return label in self._records

    def __getitem__(self, label: str) -> DecodingRecord:
        return self._records[label]

    def items(self) -> Iterable[tuple[str, DecodingRecord]]:
        """Return labels and records in the order they were added."""
        return self._records.items()

    def __len__(self) -> int:
        return len(self._records)

    def add(self, label: str, record: DecodingRecord) -> None:
        """Keep ``record`` under ``label``, on disk before this returns."""
        line = json.dumps({"label": label, "record": record.to_dict()})
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(line + "\n")
            stream.flush()
            os.fsync(stream.fileno())
        self._records[label] = record
