"""Records of a run: the columns that the metrics read, and files that `datasets` reads."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from fastdraft_hf._atomic import atomic_file
from fastdraft_hf.decode.records import DecodingRecord


class DecodingRecords(list[DecodingRecord]):
    """Records of answers, in order."""

    def columns(self, by_round: bool = False) -> dict[str, list[Any]]:
        """Return what the metrics read, a value an answer.

        Args:
            by_round: lists of one value a round, for the configuration ``rounds`` of the
                acceptance rate.

        Returns:
            ``drafted``, ``accepted``, ``new_tokens`` and ``target_passes``; the first two alone
            with ``by_round``.

        Raises:
            ValueError: ``by_round``, and a record has totals only (OpenVINO GenAI).
        """
        if not by_round:
            names = ("drafted", "accepted", "new_tokens", "target_passes")
            return {name: [getattr(r, name) for r in self] for name in names}
        for record in self:
            if record.drafted and not record.rounds:
                raise ValueError(f"record {record.key}: {record.path} does not tell its rounds")
        return {
            "drafted": [[d for d, _ in r.rounds] for r in self],
            "accepted": [[a for _, a in r.rounds] for r in self],
        }

    def save(self, path: str | Path) -> None:
        """Write ``.jsonl`` or ``.parquet``, a row an answer, columns as `DecodingRecord`'s.

        The column ``new_tokens`` comes in addition, so that the metrics can be given columns of the
        file.

        Raises:
            ValueError: the name ends otherwise.
        """
        path = Path(path)
        kind = _kind(path)
        rows = [{**r.to_dict(), "new_tokens": r.new_tokens} for r in self]
        with atomic_file(path) as temporary:
            if kind == ".jsonl":
                text = "".join(json.dumps(row) + "\n" for row in rows)
                temporary.write_text(text, encoding="utf-8")
            else:
                _write_parquet(temporary, rows)

    @classmethod
    def load(cls, path: str | Path) -> DecodingRecords:
        """Read what `save` wrote, or the ``records.jsonl`` of stage `evaluate` or `bench`.

        Raises:
            ValueError: the name ends neither in ``.jsonl`` nor in ``.parquet``.
        """
        path = Path(path)
        if _kind(path) == ".jsonl":
            rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        else:
            import pyarrow.parquet

            rows = pyarrow.parquet.read_table(path).to_pylist()
        # A stage's file has each record beside its label.
        rows = [row.get("record", row) for row in rows]
        known = {field.name for field in dataclasses.fields(DecodingRecord)}
        return cls(
            DecodingRecord.from_dict({name: row[name] for name in row if name in known})
            for row in rows
        )


def _kind(path: Path) -> str:
    if path.suffix not in (".jsonl", ".parquet"):
        raise ValueError(f"{path.name}: records are saved as .jsonl or .parquet")
    return path.suffix


def _write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    import pyarrow
    import pyarrow.parquet

    # Lists that are empty in every row would be columns of nothing.
    lists = {
        "tokens": pyarrow.list_(pyarrow.int64()),
        "rounds": pyarrow.list_(pyarrow.list_(pyarrow.int64())),
    }
    found = pyarrow.Table.from_pylist(rows).schema
    schema = pyarrow.schema([(one.name, lists.get(one.name, one.type)) for one in found])
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema=schema), path)
