"""Documents to token ids, and ids to blocks.

Documents are concatenated, each closed by one end token, and cut into blocks of ``max_length`` ids.
Nothing is padded. A source that ends is read again in another order.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fastdraft_hf._errors import FastDraftError
from fastdraft_hf.data.decontaminate import Decontaminator
from fastdraft_hf.data.documents import Document, Documents
from fastdraft_hf.data.prompts import free_prefix
from fastdraft_hf.data.sources import Source

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

EMPTY, OVERLAPS, DUPLICATE = "empty", "overlaps held-out text", "duplicate"
HELD_OUT = "held out for evaluation"

_BATCH_CHARS = 1 << 18  # text that is encoded at once, and that a resumed stream may read again


class Encoded(NamedTuple):
    """A document: 64 bits of its text's hash, its ids with the end token, bytes of its text."""

    hash: int
    ids: NDArray[Any]
    size: int


class Encoder:
    """Documents to token ids, in batches.

    Text that looks like a special token stays text: a document cannot end itself. The end token is
    the one that opens free text in `prompts.free_prefix`, so a draft sees one separator everywhere.

    Args:
        tokenizer: the target's.
        decontaminator: drops documents that overlap held-out text; ``None`` keeps all.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, decontaminator: Decontaminator | None = None
    ) -> None:
        self.end = free_prefix(tokenizer)[-1]
        self.dtype = np.dtype(np.uint16 if len(tokenizer) <= 1 << 16 else np.uint32)
        self._tokenizer, self._decontaminator = tokenizer, decontaminator
        self._backend: Any = None
        if hasattr(tokenizer, "backend_tokenizer"):
            from tokenizers import Tokenizer

            # A copy, because these settings are the tokenizer's own.
            self._backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
            self._backend.encode_special_tokens = True
            self._backend.no_truncation()
            self._backend.no_padding()

    def __call__(self, batch: Sequence[Document]) -> tuple[list[Encoded], Counter[str]]:
        """Return the documents that are kept, and how many were dropped for which reason."""
        kept: list[tuple[str, list[int] | None]] = []
        dropped: Counter[str] = Counter()
        for document in batch:
            ids = None if isinstance(document, str) else document
            # Generated rows with their prompt: the tasks may have been named after a set was made.
            text = document if isinstance(document, str) else self._tokenizer.decode(document)
            text = text.encode("utf-8", "replace").decode()  # half a surrogate pair is not text
            if not text.strip():
                dropped[EMPTY] += 1
            elif self._decontaminator is not None and self._decontaminator.overlaps(text):
                dropped[OVERLAPS] += 1
            else:
                kept.append((text, ids))
        encoded = iter(self._encode([text for text, ids in kept if ids is None]))
        found = []
        for text, ids in kept:
            raw = text.encode()
            digest = int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "little")
            found.append(Encoded(digest, self._closed(ids or next(encoded)), len(raw)))
        return found, dropped

    def _encode(self, texts: list[str]) -> list[list[int]]:
        if self._backend is not None:
            found = self._backend.encode_batch_fast(texts, add_special_tokens=False)
            return [encoding.ids for encoding in found]
        encode = self._tokenizer.encode
        return [encode(t, add_special_tokens=False, split_special_tokens=True) for t in texts]

    def _closed(self, ids: list[int]) -> NDArray[Any]:
        """Return the ids with the end token after them, once, and not before them."""
        if ids[:1] == [self.end]:  # the target's free text is opened by it
            ids = ids[1:]
        if ids[-1:] != [self.end]:
            ids = [*ids, self.end]
        return np.array(ids, self.dtype)


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document) if isinstance(document, str) else 4 * len(document)
        if size >= _BATCH_CHARS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


class SourceBlocks:
    """Packed blocks of one source without end: pass after pass, each in another order.

    Args:
        source: what to read.
        encode: see `Encoder`.
        length: ids per block.
        seed: of the order of the documents.
        generated: folder of the generated sets.
        left_out: hashes of documents that are held out.
        unique: drop documents that were read before in the same pass.

    Attributes:
        passes: the pass it is in, counted from 1.
        counts: tokens given; of the first pass the tokens, bytes and documents read, and the
            documents dropped, by reason.
    """

    def __init__(
        self,
        source: Source,
        encode: Encoder,
        *,
        length: int,
        seed: str,
        generated: Path | None,
        left_out: frozenset[int] = frozenset(),
        unique: bool = False,
    ) -> None:
        self._source, self._encode, self._length, self._seed = source, encode, length, seed
        self._generated, self._left_out, self._unique = generated, left_out, unique
        self.passes = 1
        self.counts: dict[str, Any] = {"tokens": 0, "bytes": 0, "documents": 0, "tokens_read": 0}
        self.counts["dropped"] = {}
        # The position before the batch that is being given, what was left of the one before it, and
        # how many blocks of both have been given.
        self._position: dict[str, Any] = {}
        self._carry: NDArray[Any] = np.empty(0, encode.dtype)
        self._given = 0
        self._blocks: Iterator[NDArray[Any]] | None = None

    def state_dict(self) -> dict[str, Any]:
        """Return the position after the last block, as JSON data."""
        return {
            "passes": self.passes,
            "position": self._position,
            "carry": self._carry.tolist(),
            "given": self._given,
            "counts": {**self.counts, "dropped": dict(self.counts["dropped"])},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.passes, self._position = state["passes"], state["position"]
        self._carry = np.array(state["carry"], self._encode.dtype)
        self._given = state["given"]
        self.counts = {**state["counts"], "dropped": dict(state["counts"]["dropped"])}
        self._blocks = None

    def __iter__(self) -> Iterator[NDArray[Any]]:
        return self

    def __next__(self) -> NDArray[Any]:
        if self._blocks is None:
            self._blocks = self._read()
        block = next(self._blocks)
        self.counts["tokens"] += self._length
        return block

    def facts(self) -> dict[str, Any]:
        """Return what a summary says about the source."""
        counts = {**self.counts, "dropped": dict(self.counts["dropped"])}
        read = counts.pop("tokens_read")
        per_token = round(counts["bytes"] / max(1, read), 3)
        return {**counts, "passes": self.passes, "bytes_per_token": per_token}

    def _read(self) -> Iterator[NDArray[Any]]:
        # A batch that is read again to resume inside it was counted before.
        skip, counted = self._given, self._given == 0
        while True:
            documents = Documents(self._source, self._generated, f"{self._seed}-{self.passes}")
            documents.load_state_dict(self._position)
            gave = bool(self._position)
            seen: set[int] | None = set() if self._unique else None
            for batch in _batches(documents):
                if self.passes == 1 and not self._position and counted:
                    self._drop(documents.dropped)
                ids = self._ids(batch, seen, counted)
                counted, gave = True, gave or len(ids) > 0
                joined = np.concatenate([self._carry, ids])
                whole = len(joined) // self._length
                for number in range(skip, whole):
                    self._given = number + 1
                    yield joined[number * self._length : (number + 1) * self._length]
                self._carry = joined[whole * self._length :].copy()
                self._position, self._given, skip = documents.state_dict(), 0, 0
            if not gave:
                raise no_text(self._source, {**documents.dropped, **self.counts["dropped"]})
            self.passes, self._position = self.passes + 1, {}

    def _ids(self, batch: list[Document], seen: set[int] | None, counted: bool) -> NDArray[Any]:
        encoded, dropped = self._encode(batch)
        kept = []
        for document in encoded:
            if document.hash in self._left_out:
                dropped[HELD_OUT] += 1
            elif seen is not None and document.hash in seen:
                dropped[DUPLICATE] += 1
            else:
                kept.append(document)
                if seen is not None:
                    seen.add(document.hash)
        if counted and self.passes == 1:
            self._drop(dropped)
            self.counts["documents"] += len(kept)
            self.counts["bytes"] += sum(document.size for document in kept)
            self.counts["tokens_read"] += sum(len(document.ids) for document in kept)
        parts = [document.ids for document in kept]
        return np.concatenate([np.empty(0, self._encode.dtype), *parts])

    def _drop(self, reasons: dict[str, int]) -> None:
        dropped = self.counts["dropped"]
        for reason, count in reasons.items():
            dropped[reason] = dropped.get(reason, 0) + count


def no_text(source: Source, dropped: dict[str, int]) -> FastDraftError:
    reasons = ", ".join(f"{reason}: {n}" for reason, n in dropped.items()) or "no document"
    return FastDraftError(
        f"source {source.kind} '{source.name}': it gave no text to train on ({reasons})"
    )
