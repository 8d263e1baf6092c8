"""Documents to token ids, and ids to blocks.

Documents are concatenated, each closed by one end token, and cut into blocks of ``max_length`` ids.
Nothing is padded. A source that ends is read again in another order.
"""

from __future__ import annotations

import copy
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
    """Packed blocks of one source without end: pass after pass, local text in another order each.

    Args:
        source: what to read.
        encode: see `Encoder`.
        length: ids per block.
        seed: of the order of the documents.
        generated: folder of the generated sets.
        left_out: hashes of documents that are held out.
        unique: drop documents that were read before in the same pass.
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
        self._blocks: Iterator[NDArray[Any]] | None = None
        self._state: dict[str, Any] = {
            "passes": 1,
            "position": {},  # before the batch whose blocks are being given
            "carry": [],  # ids left from the batch before it
            "given": 0,  # blocks given of both
            "tokens": 0,
            "read": {"documents": 0, "bytes": 0, "tokens": 0},  # in the first pass
            "dropped": {},  # in the first pass
        }

    def state_dict(self) -> dict[str, Any]:
        """Return the position after the last block, as JSON data."""
        return copy.deepcopy(self._state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at a position that `state_dict` returned."""
        self._state, self._blocks = copy.deepcopy(state), None

    def facts(self) -> dict[str, Any]:
        """Return tokens given and passes; documents, bytes and drops of the first pass."""
        state, read = self._state, self._state["read"]
        return {
            "tokens": state["tokens"],
            "passes": state["passes"],
            "documents": read["documents"],
            "bytes": read["bytes"],
            "bytes_per_token": round(read["bytes"] / max(1, read["tokens"]), 3),
            "dropped": dict(state["dropped"]),
        }

    def __iter__(self) -> Iterator[NDArray[Any]]:
        return self

    def __next__(self) -> NDArray[Any]:
        if self._blocks is None:
            self._blocks = self._read()
        block = next(self._blocks)
        self._state["tokens"] += self._length
        return block

    def _read(self) -> Iterator[NDArray[Any]]:
        state, length = self._state, self._length
        # A batch that is read again to resume inside it was counted before.
        skip, counted = state["given"], state["given"] == 0
        while True:
            documents = Documents(self._source, self._generated, f"{self._seed}-{state['passes']}")
            documents.load_state_dict(state["position"])
            gave = bool(state["position"])
            seen: set[int] | None = set() if self._unique else None
            for batch in _batches(documents):
                if counted and state["passes"] == 1 and not state["position"]:
                    _add(state["dropped"], documents.dropped)
                ids = self._ids(batch, seen, counted and state["passes"] == 1)
                counted, gave = True, gave or len(ids) > 0
                joined = np.concatenate([np.array(state["carry"], ids.dtype), ids])
                whole = len(joined) // length
                for number in range(skip, whole):
                    state["given"] = number + 1
                    yield joined[number * length : (number + 1) * length]
                state["carry"] = joined[whole * length :].tolist()
                state["position"], state["given"], skip = documents.state_dict(), 0, 0
            if not gave:
                raise no_text(self._source, {**documents.dropped, **state["dropped"]})
            state["passes"], state["position"] = state["passes"] + 1, {}

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
        ids = np.concatenate([np.empty(0, self._encode.dtype), *(one.ids for one in kept)])
        if counted:
            _add(self._state["dropped"], dropped)
            size = sum(document.size for document in kept)
            _add(self._state["read"], {"documents": len(kept), "bytes": size, "tokens": len(ids)})
        return ids


def _add(counts: dict[str, int], more: dict[str, int]) -> None:
    for key, count in more.items():
        counts[key] = counts.get(key, 0) + count


def no_text(source: Source, dropped: dict[str, int]) -> FastDraftError:
    """Return the error of a source that has no document to train on."""
    reasons = ", ".join(f"{reason}: {n}" for reason, n in dropped.items()) or "no document"
    return FastDraftError(
        f"source {source.kind} '{source.name}': it gave no text to train on ({reasons})"
    )
