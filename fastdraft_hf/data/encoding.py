"""Documents to token ids: filtered, hashed, closed by the document's end, in one or more processes.

A document ends with one id, the one the target's own documents were divided by (`document_end`).
It is the same id that opens free text when the target writes it (`prompts.free_prefix`), so a
draft sees one separator in corpora and in generated text. Text that looks like a special token
stays text: a document cannot end itself.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from fastdraft_hf.data.documents import Document
from fastdraft_hf.data.prompts import free_prefix
from fastdraft_hf.data.word_cache import WordCache

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

EMPTY, OVERLAPS, DUPLICATE = "empty", "overlaps held-out text", "duplicate"

# Text is encoded in pieces of this many characters: enough to be worth a process's attention.
BATCH_CHARS = 1 << 19
# Before this much text was read, starting processes costs more than it gains.
_ALONE_CHARS = 1 << 23


def document_end(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the id that closes a document."""
    return free_prefix(tokenizer)[-1]


@dataclass
class Encoded:
    """Documents as one run of ids, each closed by the document's end.

    Attributes:
        ids: every document's ids, one after the other (uint16 where the vocabulary fits, else
            uint32).
        lengths: ids of every document, its end included (int64).
        hashes: 64 bits of every document's text (uint64).
        sizes: UTF-8 bytes of every document's text (int64).
        dropped: how many documents were left out, by reason.
    """

    ids: NDArray[Any]
    lengths: NDArray[np.int64]
    hashes: NDArray[np.uint64]
    sizes: NDArray[np.int64]
    dropped: dict[str, int] = field(default_factory=dict)

    def select(self, keep: NDArray[np.bool_], reason: str) -> Encoded:
        """Return the documents where ``keep`` is true; the others are counted under ``reason``."""
        gone = int((~keep).sum())
        if not gone:
            return self
        dropped = {**self.dropped, reason: self.dropped.get(reason, 0) + gone}
        ids = self.ids[np.repeat(keep, self.lengths)]
        return Encoded(ids, self.lengths[keep], self.hashes[keep], self.sizes[keep], dropped)


class DocumentEncoder:
    """Encodes batches of documents.

    Args:
        tokenizer: the target's.
        overlaps: whether a text overlaps held-out text, and must be left out.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, overlaps: Callable[[str], bool]) -> None:
        self.end = document_end(tokenizer)
        self.dtype = np.dtype(np.uint16 if len(tokenizer) <= 1 << 16 else np.uint32)
        self._overlaps = overlaps
        self._tokenizer = tokenizer
        self._cache: WordCache | None = None
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        # What was learnt stays behind: a process of its own starts anew.
        return {**self.__dict__, "_cache": None, "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())

    def _encode(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        if backend is None:
            return [
                self._tokenizer.encode(t, add_special_tokens=False, split_special_tokens=True)
                for t in texts
            ]
        with self._lock:  # several streams may read at once
            if self._cache is None:
                from tokenizers import Tokenizer

                # A copy: the setting that keeps special tokens text is the tokenizer's own.
                self._cache = WordCache(Tokenizer.from_str(backend.to_str()))
            return self._cache.encode(texts)

    def __call__(self, batch: list[Document]) -> Encoded:
        """Return a batch as ids; empty documents and overlaps with held-out text are left out."""
        dropped: dict[str, int] = {}
        kept: list[tuple[str, list[int] | None]] = []
        for document in batch:
            ids = None if isinstance(document, str) else document
            # With its prompt: the tasks may have been named after a set was written.
            text = document if isinstance(document, str) else self._tokenizer.decode(document)
            # Half a surrogate pair is no text, and nothing can write it.
            text = text.encode("utf-8", "replace").decode() if _has_surrogates(text) else text
            reason = EMPTY if not text.strip() else OVERLAPS if self._overlaps(text) else None
            if reason is None:
                kept.append((text, ids))
            else:
                dropped[reason] = dropped.get(reason, 0) + 1
        encoded = iter(self._encode([text for text, ids in kept if ids is None]))
        parts = [self._closed(ids if ids is not None else next(encoded)) for _, ids in kept]
        raw = [text.encode() for text, _ in kept]
        return Encoded(
            np.concatenate(parts) if parts else np.empty(0, self.dtype),
            np.array([len(part) for part in parts], np.int64),
            np.array([_hash(one) for one in raw], np.uint64),
            np.array([len(one) for one in raw], np.int64),
            dropped,
        )

    def _closed(self, ids: list[int]) -> NDArray[Any]:
        """Return the ids with the end after them, once, and not before them."""
        if ids[0] == self.end:  # the target's free text is opened by it
            ids = ids[1:]
        if not ids or ids[-1] != self.end:
            ids = [*ids, self.end]
        return np.array(ids, self.dtype)


def _has_surrogates(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def _hash(raw: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "little")


def batches(documents: Iterable[Document], chars: int = BATCH_CHARS) -> Iterator[list[Document]]:
    """Yield documents in lists of about ``chars`` characters."""
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document) if isinstance(document, str) else 4 * len(document)
        if size >= chars:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def available_processes() -> int:
    """Return the number of cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


# ------------------------------------------------------------------------------ several processes

_ENCODER: DocumentEncoder | None = None


def _start(encoder: DocumentEncoder) -> None:
    """Begin a worker: it ends with the process that started it, even if that was killed."""
    import multiprocessing

    global _ENCODER
    _ENCODER = encoder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    parent = multiprocessing.parent_process()

    def watch() -> None:
        assert parent is not None
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _work(batch: list[Document]) -> Encoded:
    assert _ENCODER is not None
    return _ENCODER(batch)


def encode_batches(
    encoder: DocumentEncoder, tagged: Iterable[tuple[list[Document], Any]], processes: int = 1
) -> Iterator[tuple[Encoded, Any]]:
    """Yield every batch encoded, with its tag, in the order they came.

    The first few megabytes are encoded here, so that small corpora start no processes.
    """
    chars = 0
    waiting: list[tuple[Future[Encoded], Any]] = []
    pool: Any = None
    try:
        for batch, tag in tagged:
            if processes < 2 or chars < _ALONE_CHARS:
                chars += sum(len(document) for document in batch)
                yield encoder(batch), tag
                continue
            if pool is None:
                import multiprocessing
                from concurrent.futures import ProcessPoolExecutor

                # Not forked: this process has threads of torch and of the tokenizer.
                pool = ProcessPoolExecutor(
                    processes,
                    mp_context=multiprocessing.get_context("spawn"),
                    initializer=_start,
                    initargs=(encoder,),
                )
            waiting.append((pool.submit(_work, batch), tag))
            if len(waiting) > 2 * processes:
                future, tag = waiting.pop(0)
                yield future.result(), tag
        for future, tag in waiting:
            yield future.result(), tag
    finally:
        if pool is not None:
            pool.shutdown(wait=False, cancel_futures=True)
