"""The text that pretrain and continue read: a memory-mapped dataset of packed blocks, or a stream.

Weights of the sources are shares of blocks, so of tokens, whatever the lengths of the documents.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastdraft_hf._atomic import atomic_file, write_json
from fastdraft_hf._errors import FastDraftError
from fastdraft_hf._processes import on_main
from fastdraft_hf.data import installed
from fastdraft_hf.data.decontaminate import Decontaminator
from fastdraft_hf.data.documents import Documents
from fastdraft_hf.data.packing import Encoded, Encoder, SourceBlocks, no_text
from fastdraft_hf.data.sources import Source, summary_keys, token_shares
from fastdraft_hf.data.stream import BlockStream

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

_ROWS_WRITTEN = 1024  # blocks of one write


@dataclass(frozen=True)
class Corpus:
    """What a stage trains on.

    Attributes:
        train: rows of ``input_ids``; the labels are the same.
        eval: held-out blocks, if any.
        summary: per source what is read, dropped and held out; and the held-out task sets.
        stream: what ``train`` reads where it is a stream. A checkpoint holds its position.
    """

    train: Dataset | IterableDataset
    eval: Dataset | None
    summary: dict[str, Any]
    stream: BlockStream | None = None


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

    Every process of a run calls it; the main one writes. A killed run continues with the first
    source that is not finished and gets the same blocks. Blocks are in the order of their sources:
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
    import datasets

    encode = Encoder(tokenizer, decontaminator)
    writer = _Writer(
        list(sources), encode, folder, tokens // max_length, max_length, eval_rows, seed, generated
    )
    on_main(lambda: writer.write(streaming))
    summary = _read(folder / "summary.json")
    summary["held_out"] = {} if decontaminator is None else decontaminator.held_out
    eval_file = folder / "eval.arrow"
    held_out = datasets.Dataset.from_file(str(eval_file)) if eval_file.exists() else None
    if streaming:
        stream = BlockStream(
            sources,
            encode,
            length=max_length,
            seed=seed,
            generated=generated,
            left_out=frozenset(_read(folder / "left_out.json")),
        )
        return Corpus(stream.as_dataset(), held_out, summary, stream)
    files = sorted(folder.glob("train-*.arrow"))
    parts = [datasets.Dataset.from_file(str(file)) for file in files]
    return Corpus(datasets.concatenate_datasets(parts), held_out, summary)


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


@dataclass
class _Writer:
    """Writes what `open_corpus` opens; a file that exists is finished."""

    sources: list[Source]
    encode: Encoder
    folder: Path
    blocks: int
    length: int
    eval_rows: int
    seed: int
    generated: Path

    def write(self, streaming: bool) -> None:
        """Write the held-out blocks, each source's share unless it is a stream, and the summary."""
        if (self.folder / "summary.json").exists():
            return
        if not (self.folder / "left_out.json").exists():
            self._hold_out()
        samples = _read(self.folder / "samples.json")
        shares = token_shares([source.weight for source in self.sources], self.blocks)
        summary: dict[str, Any] = {}
        for number, key in enumerate(summary_keys(self.sources)):
            source, share, sample = self.sources[number], shares[number], samples[number]
            held_out = sample.pop("held_out_tokens")
            if streaming:
                # The last checkpoint has what was really read.
                documents = share * self.length * sample["documents"] / sample["tokens_read"]
                facts = {
                    "tokens": share * self.length,
                    "bytes_per_token": sample["bytes_per_token"],
                    "documents_estimated": round(documents),
                    "sample": sample,
                }
            else:
                facts = self._write_source(number, share)
            facts["held_out_tokens"] = held_out
            if source.kind in ("packages", "package_docs"):
                facts["licenses"] = installed.licenses(source.name)
                facts["packages_left_out_by_license"] = installed.packages(source.name)[1]
            summary[key] = facts
        held = sum(facts["held_out_tokens"] for facts in summary.values()) // self.length
        write_json(
            self.folder / "summary.json", {"sources": summary, "examples": self.blocks + held}
        )

    def _hold_out(self) -> None:
        shares = token_shares([source.weight for source in self.sources], self.eval_rows)
        rows: list[NDArray[Any]] = []
        hashes: set[int] = set()
        samples = []
        for number, share in enumerate(shares):
            documents, sample = self._sample(number, max(5 * share, 2) * self.length)
            ids = documents[0].ids[:0]
            wanted = min(share, sample["tokens_read"] // self.length // 5) * self.length
            for document in documents:
                if len(ids) >= wanted:
                    break
                ids = np.concatenate([ids, document.ids])
                hashes.add(document.hash)
            rows += list(ids[:wanted].reshape(-1, self.length))
            samples.append({**sample, "held_out_tokens": wanted})
        if rows:
            self._write_blocks("eval.arrow", rows)
        write_json(self.folder / "samples.json", samples)
        write_json(self.folder / "left_out.json", sorted(hashes))

    def _sample(self, number: int, tokens: int) -> tuple[list[Encoded], dict[str, Any]]:
        """Return a source's first documents, and facts about them."""
        source = self.sources[number]
        reader = Documents(source, self.generated, f"{self.seed}-{number}-1")
        found: list[Encoded] = []
        dropped: Counter[str] = Counter()
        total = 0
        for document in reader:  # one by one: no more is held out than is needed
            encoded, reasons = self.encode([document])
            dropped += reasons
            found += encoded
            total += sum(len(one.ids) for one in encoded)
            if total >= tokens:
                break
        if not total:
            raise no_text(source, {**reader.dropped, **dropped})
        if total < self.length:
            raise FastDraftError(
                f"source {source.kind} '{source.name}': its {total:,} tokens give no block of "
                f"{self.length} to train on; lower max_length or leave the source out"
            )
        size = sum(document.size for document in found)
        facts = {"documents": len(found), "bytes": size, "tokens_read": total}
        return found, {
            **facts,
            "bytes_per_token": round(size / total, 3),
            "dropped": dict(dropped),
        }

    def _write_source(self, number: int, share: int) -> dict[str, Any]:
        """Write a source's share of the blocks; return its facts."""
        done = self.folder / f"train-{number:03d}.json"
        if not done.exists():
            stream = SourceBlocks(
                self.sources[number],
                self.encode,
                length=self.length,
                seed=f"{self.seed}-{number}",
                generated=self.generated,
                left_out=frozenset(_read(self.folder / "left_out.json")),
                unique=True,
            )
            if share:
                self._write_blocks(f"{done.stem}.arrow", islice(stream, share), share)
            write_json(done, stream.facts() if share else {"tokens": 0, "passes": 0})
        return dict(_read(done))

    def _write_blocks(
        self, name: str, blocks: Iterable[NDArray[Any]], count: int | None = None
    ) -> None:
        """Write an arrow file that `Dataset.from_file` maps into memory."""
        import pyarrow as pa
        from tqdm import tqdm

        ids = pa.list_(pa.from_numpy_dtype(self.encode.dtype), self.length)
        schema = pa.schema({"input_ids": ids})
        remaining = iter(blocks)
        with (
            tqdm(total=count, desc="blocks", disable=None if count else True) as bar,
            atomic_file(self.folder / name) as temporary,
            pa.OSFile(str(temporary), "wb") as sink,
            pa.ipc.new_stream(sink, schema) as writer,
        ):
            while rows := list(islice(remaining, _ROWS_WRITTEN)):
                flat = pa.array(np.concatenate(rows))
                column = pa.FixedSizeListArray.from_arrays(flat, self.length)
                writer.write_batch(pa.record_batch([column], schema=schema))
                bar.update(len(rows))


_NAMES = {
    "tokens": "tokens to train on",
    "passes": "passes",
    "documents": "documents",
    "documents_estimated": "documents (estimated)",
    "bytes": "bytes of text",
    "bytes_per_token": "bytes per token",
    "completion_tokens": "completion tokens",
}


def summary_lines(summary: dict[str, Any]) -> list[str]:
    """Return a line per source: tokens, passes, documents, and what was dropped."""
    lines = []
    for key, facts in summary.items():
        parts = [f"{facts[k]:,} {what}" for k, what in _NAMES.items() if facts.get(k) is not None]
        if facts.get("dropped"):
            dropped = ", ".join(f"{n:,} {why}" for why, n in facts["dropped"].items())
            parts.append(f"dropped: {dropped}")
        lines.append(f"{key}: {'; '.join(parts)}")
    return lines
