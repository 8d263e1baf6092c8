"""What the training stages read: packed text, or completions of the target.

Text for pretrain and continue is a memory-mapped dataset of packed blocks, or a stream. Weights of
the sources are shares of blocks, so of tokens, whatever the lengths of the documents. Completions
for align are a memory-mapped dataset of rows.
"""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow as pa
from datasets import Dataset, IterableDataset
from numpy.typing import NDArray
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from fastdraft_hf._atomic import atomic_file, read_json, write_json
from fastdraft_hf._errors import FastDraftError
from fastdraft_hf._processes import on_main
from fastdraft_hf.data import installed
from fastdraft_hf.data.columns import IGNORED, LISTS, TEMPERATURE, token_table
from fastdraft_hf.data.filters import KEPT, kept_indices
from fastdraft_hf.data.packing import BlockStream, Encoded, Encoder, SourceBlocks, no_text
from fastdraft_hf.data.parts import iter_tables
from fastdraft_hf.data.sources import Documents, Source, summary_keys
from fastdraft_hf.data.task_sets import Decontaminator

_ROWS_WRITTEN = 1024  # blocks of one write
_SOURCE = "source"  # number of a row's source


class Corpus(NamedTuple):
    """What a stage trains on."""

    train: Dataset | IterableDataset  # blocks have ``input_ids``; the labels are the same
    eval: Dataset | None  # held-out blocks or rows
    summary: dict[str, Any]  # what is read, dropped and held out per source; held-out task sets
    stream: BlockStream | None = None  # what ``train`` reads; a checkpoint holds its position


def open_corpus(
    sources: Sequence[Source],
    tokenizer: PreTrainedTokenizerBase,
    *,
    folder: Path,
    tokens: int,
    max_length: int,
    eval_rows: int,
    seed: int,
    generated: Path,
    decontaminator: Decontaminator | None = None,
    streaming: bool = False,
) -> Corpus:
    """Return a stage's packed text; write it into ``folder`` where it is not there yet.

    Every process of a run calls it; the main one writes. Blocks are in the order of their sources:
    the trainer's sampler shuffles them.

    Args:
        sources: what to read, with weights.
        tokenizer: the target's.
        folder: of this corpus alone.
        tokens: budget; ``tokens // max_length`` blocks are written.
        max_length: ids per block.
        eval_rows: blocks to hold out, at most a fifth of a source. They are cut from the first
            documents of every source, and these documents are not trained on in any source.
        seed: of every order.
        generated: folder of the generated sets.
        decontaminator: drops documents that overlap held-out prompts; ``None`` keeps all.
        streaming: read while training, and write the held-out blocks only.

    Raises:
        FastDraftError: a source cannot be read, or gives no text or not one block.
    """
    encode = Encoder(tokenizer, decontaminator)
    settings: dict[str, Any] = {"length": max_length, "generated": generated}

    def write() -> None:
        """Write the held-out blocks, the blocks unless they are streamed, and the summary."""
        held_out, hashes = _hold_out(folder, sources, encode, eval_rows, seed, **settings)
        shares = block_shares(sources, tokens // max_length)
        streams = [
            SourceBlocks(
                source, encode, seed=f"{seed}-{n}", left_out=hashes, unique=True, **settings
            )
            for n, source in enumerate(sources)
        ]
        if not streaming:
            blocks = (block for some in map(islice, streams, shares) for block in some)
            _write_blocks(folder / "train.arrow", blocks, encode, max_length)
        summary: dict[str, Any] = {}
        for number, (key, source) in enumerate(zip(summary_keys(sources), sources, strict=True)):
            facts: dict[str, Any] = {} if streaming else streams[number].read
            facts |= {"tokens": shares[number] * max_length, "held_out_tokens": held_out[number]}
            if source.kind in ("packages", "package_docs"):
                facts["licenses"] = installed.licenses(source.name)
            summary[key] = facts
        write_json(folder / "hashes.json", sorted(hashes))
        write_json(folder / "summary.json", summary)

    on_main(lambda: None if (folder / "summary.json").exists() else write())
    summary = {"sources": read_json(folder / "summary.json")}
    summary["held_out"] = {} if decontaminator is None else decontaminator.held_out
    evaluated, trained = folder / "eval.arrow", folder / "train.arrow"
    held_out = datasets.Dataset.from_file(str(evaluated)) if evaluated.exists() else None
    if streaming:
        left_out = frozenset(read_json(folder / "hashes.json"))
        stream = BlockStream(sources, encode, seed=seed, left_out=left_out, **settings)
        return Corpus(stream.as_dataset(), held_out, summary, stream)
    return Corpus(datasets.Dataset.from_file(str(trained)), held_out, summary)


def block_shares(sources: Sequence[Source], blocks: int) -> list[int]:
    """Return each source's share of ``blocks`` by its weight; their sum is exact."""
    ends = np.cumsum([0.0, *(source.weight for source in sources)])
    return [int(share) for share in np.diff(np.rint(blocks * ends / ends[-1]))]


def _hold_out(
    folder: Path,
    sources: Sequence[Source],
    encode: Encoder,
    eval_rows: int,
    seed: int,
    length: int,
    generated: Path,
) -> tuple[list[int], frozenset[int]]:
    """Write the held-out blocks; return their tokens per source and their documents' hashes."""
    rows: list[NDArray[Any]] = []
    hashes: set[int] = set()
    tokens = []
    for number, (source, share) in enumerate(
        zip(sources, block_shares(sources, eval_rows), strict=True)
    ):
        found: list[Encoded] = []
        dropped: Counter[str] = Counter()
        total = 0
        # One by one: no more is held out than is needed.
        for document in Documents(source, generated, f"{seed}-{number}-1"):
            encoded, reasons = encode([document])
            dropped += reasons
            found += encoded
            total += sum(len(one.ids) for one in encoded)
            if total >= max(5 * share, 2) * length:
                break
        if not total:
            raise no_text(source, dropped)
        if total < length:
            raise FastDraftError(
                f"source {source.kind} '{source.name}': its {total:,} tokens give no block of "
                f"{length} to train on; lower max_length or leave the source out"
            )
        wanted = min(share, total // length // 5) * length
        start = 0
        for one in found:
            if start < wanted:
                hashes.add(one.hash)
            start += len(one.ids)
        rows += list(np.concatenate([one.ids for one in found])[:wanted].reshape(-1, length))
        tokens.append(wanted)
    if rows:
        _write_blocks(folder / "eval.arrow", rows, encode, length)
    return tokens, frozenset(hashes)


def _write_blocks(path: Path, blocks: Iterable[NDArray[Any]], encode: Encoder, length: int) -> None:
    """Write an Arrow file that `Dataset.from_file` maps into memory."""
    schema = pa.schema({"input_ids": pa.list_(pa.from_numpy_dtype(encode.dtype), length)})
    remaining = iter(tqdm(blocks, "blocks", disable=None))
    with (
        atomic_file(path) as temporary,
        pa.OSFile(str(temporary), "wb") as sink,
        pa.ipc.new_stream(sink, schema) as writer,
    ):
        while rows := list(islice(remaining, _ROWS_WRITTEN)):
            column = pa.FixedSizeListArray.from_arrays(pa.array(np.concatenate(rows)), length)
            writer.write_batch(pa.record_batch([column], schema=schema))


def summary_lines(summary: dict[str, Any]) -> list[str]:
    """Return a line per source: what was read and dropped."""
    lines = []
    for key, facts in summary.items():
        counts = {**facts, **{f"dropped ({why})": n for why, n in facts.get("dropped", {}).items()}}
        parts = [f"{n:,} {k.replace('_', ' ')}" for k, n in counts.items() if isinstance(n, int)]
        lines.append(f"{key}: {'; '.join(parts)}")
    return lines


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
) -> Corpus:
    """Return the rows to train and evaluate on, memory-mapped.

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
        rows with ``input_ids``, ``labels`` (-100 on prompts) and, with ``logits``, the columns of
        `columns`; the summary has for each source the ``completion_tokens`` within ``max_length``
        and the number of rows kept and dropped, by reason.

    Raises:
        FastDraftError: a part is damaged or missing, or no row is left.
    """

    def judge(index: int, ids: list[int], labels: list[int]) -> str:
        if all(label == IGNORED for label in labels[:max_length]):
            return "prompt too long"
        if not keep(index):
            return "left out"
        return "overlaps held-out text" if decontaminator.overlaps(tokenizer.decode(ids)) else KEPT

    def prepare() -> None:
        """Write all rows to one arrow file, and the summary last."""
        if (folder / "summary.json").exists():
            return
        summary: dict[str, Any] = {}
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_file(folder / "rows.arrow") as temporary, contextlib.ExitStack() as stack:
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
                    table = table.filter(pa.array([r == KEPT for r in reasons], pa.bool_()))
                    for labels in table["labels"].to_pylist():
                        tokens += sum(label != IGNORED for label in labels[:max_length])
                    table = table.append_column(_SOURCE, pa.array(np.full(len(table), number)))
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
        write_json(folder / "summary.json", summary)

    on_main(prepare)
    rows = datasets.Dataset.from_file(str(folder / "rows.arrow"))
    numbers = rows.select_columns([_SOURCE, "index"]).with_format("numpy")[:]
    # By source and index, whatever parts the rows are in, and then shuffled.
    order = np.random.default_rng(seed).permutation(
        np.lexsort([numbers["index"], numbers[_SOURCE]])
    )
    rows = rows.remove_columns([_SOURCE, "index"])
    held_out = min(eval_rows, len(order) // 5)
    summary = {"sources": read_json(folder / "summary.json"), "held_out": decontaminator.held_out}
    evaluated = rows.select(order[:held_out]) if held_out else None
    return Corpus(rows.select(order[held_out:]), evaluated, summary)


def _tables(
    name: str, kept: np.ndarray, generated: Path, logits: Path | None
) -> Iterator[pa.Table]:
    """Yield the kept rows of a set as tables with ``index``, ``input_ids`` and ``labels``."""
    if logits is not None:
        names = ["index", "input_ids", "labels", *LISTS, TEMPERATURE]
        yield from iter_tables(logits / name, names, kept)
        return
    for table in iter_tables(generated / name, ["index", "prompt_ids", "completion_ids"], kept):
        prompts, ids = table["prompt_ids"].to_pylist(), table["completion_ids"].to_pylist()
        yield token_table(table["index"], prompts, ids)
