"""Completions of the target as a memory-mapped dataset: the rows that stage align reads."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastdraft_hf._atomic import atomic_file, write_json
from fastdraft_hf._errors import FastDraftError
from fastdraft_hf._processes import on_main
from fastdraft_hf.data.columns import IGNORED, LISTS, TEMPERATURE
from fastdraft_hf.data.filters import KEPT, kept_indices
from fastdraft_hf.data.parts import iter_tables
from fastdraft_hf.data.sources import Source, summary_keys
from fastdraft_hf.data.task_sets import Decontaminator

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

_ROWS, _SUMMARY = "rows.arrow", "summary.json"
_SOURCE = "source"  # number of a row's source


def open_completions(
    sources: Sequence[Source],
    *,
    folder: Path,
    generated: Path,
    logits: Path | None,
    tokenizer: PreTrainedTokenizerBase,
    decontaminator: Decontaminator,
    max_length: int,
    eval_rows: int,
    seed: int,
    keep: Callable[[int], bool] = lambda index: True,
) -> tuple[Dataset, Dataset | None, dict[str, Any]]:
    """Return the rows to train and evaluate on, memory-mapped, and a summary per source.

    The main process prepares ``folder`` once; later calls and other processes open it. Rows are
    whole: the trainer cuts them to ``max_length``. Their order depends on the seed and the rows'
    indices, not on the processes that wrote them.

    Args:
        sources: of kind ``generated``.
        folder: where the rows are prepared.
        generated: folder of stage generate.
        logits: folder of stage logits. ``None`` gives rows without a distribution.
        tokenizer: the target's, to decode rows for the decontaminator.
        max_length: rows whose prompt alone is as long are dropped.
        eval_rows: rows to evaluate on, at most a fifth of all.
        seed: of the order.
        keep: whether to keep a row, by its index.

    Returns:
        train and eval rows with ``input_ids``, ``labels`` (-100 on prompts) and, with ``logits``,
        the columns of `columns`; and for each source the ``completion_tokens`` within
        ``max_length`` and the number of rows kept and dropped, by reason.

    Raises:
        FastDraftError: a source is not a generated set, a part is damaged or missing, or no row
            is left.
    """
    import datasets

    def judge(index: int, ids: list[int], labels: list[int]) -> str:
        if all(label == IGNORED for label in labels[:max_length]):
            return "prompt too long"
        if not keep(index):
            return "left out"
        return "overlaps held-out text" if decontaminator.overlaps(tokenizer.decode(ids)) else KEPT

    def prepare() -> None:
        """Write all rows to one arrow file, and the summary last."""
        import pyarrow as pa

        if (folder / _SUMMARY).exists():
            return
        summary: dict[str, Any] = {}
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_file(folder / _ROWS) as temporary, contextlib.ExitStack() as stack:
            sink = stack.enter_context(pa.OSFile(str(temporary), "wb"))
            writer: pa.RecordBatchStreamWriter | None = None
            for number, (key, source) in enumerate(
                zip(summary_keys(sources), sources, strict=True)
            ):
                kept, counts = kept_indices(generated / source.name)
                tokens = rows = 0
                for table in _tables(source.name, kept, generated, logits):
                    rows += len(table)
                    columns = [table[name].to_pylist() for name in ("index", "input_ids", "labels")]
                    reasons = [judge(*row) for row in zip(*columns, strict=True)]
                    counts.update(reasons)
                    counts[KEPT] -= len(reasons)  # counted by kept_indices already
                    table = table.filter(
                        pa.array([reason == KEPT for reason in reasons], pa.bool_())
                    )
                    for labels in table["labels"].to_pylist():
                        tokens += sum(label != IGNORED for label in labels[:max_length])
                    table = table.append_column(
                        _SOURCE, pa.array([number] * len(table), pa.int32())
                    )
                    if writer is None:
                        writer = stack.enter_context(pa.ipc.new_stream(sink, table.schema))
                    writer.write_table(table)
                if rows != len(kept):
                    raise FastDraftError(
                        f"{logits}: set {source.name} has {rows:,} of {len(kept):,} rows. Run "
                        "stage logits again to store the missing ones"
                    )
                summary[key] = {"completion_tokens": tokens, **counts}
        if not any(counts[KEPT] for counts in summary.values()):
            raise FastDraftError(f"align.sources: no row is left to train on ({summary})")
        write_json(folder / _SUMMARY, summary)

    for source in sources:
        if source.kind != "generated":
            raise FastDraftError(
                f"align.sources: '{source.name or source.kind}' is of kind {source.kind}; align "
                "reads sets of kind generated"
            )
    on_main(prepare)
    rows = datasets.Dataset.from_file(str(folder / _ROWS))
    numbers = rows.select_columns([_SOURCE, "index"]).with_format("numpy")[:]
    # By source and index, whatever parts the rows are in, and then shuffled.
    order = np.random.default_rng(seed).permutation(
        np.lexsort([numbers["index"], numbers[_SOURCE]])
    )
    rows = rows.remove_columns([_SOURCE, "index"])
    held_out = min(eval_rows, len(order) // 5)
    summary = json.loads((folder / _SUMMARY).read_text(encoding="utf-8"))
    evaluated = rows.select(order[:held_out]) if held_out else None
    return rows.select(order[held_out:]), evaluated, summary


def _tables(
    name: str, kept: np.ndarray, generated: Path, logits: Path | None
) -> Iterator[pa.Table]:
    """Yield the kept rows of a set as tables with ``index``, ``input_ids`` and ``labels``."""
    import pyarrow as pa

    if logits is not None:
        for table in iter_tables(
            logits / name, ["index", "input_ids", "labels", *LISTS, TEMPERATURE]
        ):
            yield table.filter(pa.array(np.isin(table["index"].to_numpy(), kept)))
        return
    ids_type = pa.list_(pa.int32())
    for table in iter_tables(generated / name, ["index", "prompt_ids", "completion_ids"]):
        table = table.filter(pa.array(np.isin(table["index"].to_numpy(), kept)))
        pairs = list(
            zip(table["prompt_ids"].to_pylist(), table["completion_ids"].to_pylist(), strict=True)
        )
        labels = [[IGNORED] * len(prompt) + completion for prompt, completion in pairs]
        yield pa.table(
            {
                "index": table["index"],
                "input_ids": pa.array([prompt + ids for prompt, ids in pairs], ids_type),
                "labels": pa.array(labels, ids_type),
            }
        )
