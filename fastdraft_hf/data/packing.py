"""Documents to token ids, ids to blocks, and blocks of several sources to a stream.

Documents are concatenated, each closed by one end token, and cut into blocks of ``max_length`` ids.
Nothing is padded. A source that ends is read again in another order.
"""

from __future__ import annotations

import copy
import hashlib
import random
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
from datasets import IterableDataset
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from fastdraft_hf._errors import FastDraftError
from fastdraft_hf.data.prompts import free_prefix
from fastdraft_hf.data.sources import Document, Documents, Source, summary_keys
from fastdraft_hf.data.task_sets import Decontaminator

_ENCODED = 128  # documents that are encoded at once
WINDOW = 256  # blocks that are shuffled together
_WINDOWS_KEPT = 64  # of which a loader may have fetched ahead


class Encoded(NamedTuple):
    """A document: 64 bits of its text's hash, its ids with the end token."""

    hash: int
    ids: NDArray[Any]


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

    def __call__(self, batch: Sequence[Document]) -> tuple[list[Encoded], Counter[str]]:
        """Return the documents that are kept, and how many were dropped for which reason."""
        kept: list[tuple[str, list[int] | None]] = []
        dropped: Counter[str] = Counter()
        for document in batch:
            # Generated rows too: the tasks may have been named after a set was made.
            ids = None if isinstance(document, str) else document
            text = document if isinstance(document, str) else self._tokenizer.decode(document)
            text = text.encode("utf-8", "replace").decode()  # half a surrogate pair is not text
            if not text.strip():
                dropped["empty"] += 1
            elif self._decontaminator is not None and self._decontaminator.overlaps(text):
                dropped["overlaps held-out text"] += 1
            else:
                kept.append((text, ids))
        texts = [text for text, ids in kept if ids is None]
        # The defaults neither truncate nor pad.
        how: dict[str, Any] = {"add_special_tokens": False, "split_special_tokens": True}
        how |= {"return_attention_mask": False, "verbose": False}
        encoded = iter(self._tokenizer(texts, **how)["input_ids"] if texts else [])
        found = []
        for text, ids in kept:
            digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
            own = self._closed(ids or next(encoded))
            found.append(Encoded(int.from_bytes(digest, "little"), own))
        return found, dropped

    def _closed(self, ids: list[int]) -> NDArray[Any]:
        """Return the ids with the end token after them, once, and not before them."""
        if ids[:1] == [self.end]:  # the target's free text is opened by it
            ids = ids[1:]
        if ids[-1:] != [self.end]:
            ids = [*ids, self.end]
        return np.array(ids, self.dtype)


class SourceBlocks:
    """Packed blocks of one source without end: pass after pass, local text in another order each.

    Arguments are those of `BlockStream`; with ``unique`` documents that were read before in the
    same pass are dropped. ``read`` has the tokens given and the passes so far, and the documents
    and drops of the first pass.
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
        self._source, self._encode, self.length, self._seed = source, encode, length, seed
        self._generated, self._left_out, self._unique = generated, left_out, unique
        self.read: dict[str, Any] = {"tokens": 0, "passes": 1, "documents": 0, "dropped": Counter()}
        self._position: dict[str, Any] = {}  # after the last batch of documents
        self._carry = np.empty(0, encode.dtype)  # ids that are read and not yet in a block
        self._batches = self._read_batches()

    def state_dict(self) -> dict[str, Any]:
        """Return the position after the last block: JSON data but for the array ``carry``."""
        state = {"read": self.read, "position": self._position, "carry": self._carry}
        return copy.deepcopy(state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at a position that `state_dict` returned, before the first block is read."""
        self.read = {**state["read"], "dropped": Counter(state["read"]["dropped"])}
        self._position, self._carry = state["position"], np.array(state["carry"], self._carry.dtype)

    def __iter__(self) -> Iterator[NDArray[Any]]:
        return self

    def __next__(self) -> NDArray[Any]:
        while len(self._carry) < self.length:
            self._carry = np.concatenate([self._carry, next(self._batches)])
        block, self._carry = self._carry[: self.length], self._carry[self.length :]
        self.read["tokens"] += self.length
        return block

    def _read_batches(self) -> Iterator[NDArray[Any]]:
        while True:
            number = self.read["passes"]
            documents = Documents(self._source, self._generated, f"{self._seed}-{number}")
            documents.load_state_dict(self._position)
            remaining, found, seen = iter(documents), bool(self._position), set[int]()
            while batch := list(islice(remaining, _ENCODED)):
                ids = self._kept_ids(batch, seen)
                found, self._position = found or len(ids) > 0, documents.state_dict()
                yield ids
            if not found:
                raise no_text(self._source, self.read["dropped"])
            self.read["passes"], self._position = number + 1, {}

    def _kept_ids(self, batch: list[Document], seen: set[int]) -> NDArray[Any]:
        encoded, dropped = self._encode(batch)
        kept = []
        for document in encoded:
            if document.hash in self._left_out:
                dropped["held out for evaluation"] += 1
            elif document.hash in seen:
                dropped["duplicate"] += 1
            else:
                kept.append(document)
                if self._unique:
                    seen.add(document.hash)
        ids = np.concatenate([np.empty(0, self._encode.dtype), *(one.ids for one in kept)])
        if self.read["passes"] == 1:
            self.read["dropped"].update(dropped)
            self.read["documents"] += len(kept)
        return ids


def no_text(source: Source, dropped: dict[str, int]) -> FastDraftError:
    """Return the error of a source that has no document to train on."""
    reasons = ", ".join(f"{reason}: {n}" for reason, n in dropped.items()) or "no document"
    return FastDraftError(
        f"source {source.kind} '{source.name}': it gave no text to train on ({reasons})"
    )


class BlockStream:
    """Packed blocks of a mixture without end, resumable at every block.

    Iterating yields ``{"input_ids": …}``. Blocks come in windows. A window has of every source the
    blocks that its weight asks for, counted over all windows so far, shuffled by the seed.

    Args:
        sources: what to read, with weights.
        encode: see `Encoder`.
        length: ids per block.
        seed: of every order.
        generated: folder of the generated sets.
        left_out: hashes of documents that are held out.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        encode: Encoder,
        *,
        length: int,
        seed: int,
        generated: Path | None = None,
        left_out: frozenset[int] = frozenset(),
    ) -> None:
        self._sources, self._encode = list(sources), encode
        self._seed, self._window = seed, WINDOW
        self._settings = {"length": length, "generated": generated, "left_out": left_out}
        self._start: dict[str, Any] = {"window": 0, "taken": 0}
        # At the beginning of the last windows of the latest iteration.
        self._states: deque[dict[str, Any]] = deque()

    @property
    def start(self) -> int:
        """Number of blocks before the position at which iterations begin."""
        return int(self._start["window"] * self._window + self._start["taken"])

    def state_dict(self, blocks: int) -> dict[str, Any]:
        """Return the position after ``blocks`` blocks, counted from the stream's beginning.

        It is JSON data. Blocks that a loader fetched beyond it come again. Its ``read`` has the
        facts of every source at the end of the window.

        Raises:
            ValueError: that position is too long ago.
        """
        for state in reversed(self._states):
            if state["window"] * self._window <= blocks:
                sources = [{**one, "carry": one["carry"].tolist()} for one in state["sources"]]
                taken = blocks - state["window"] * self._window
                return {**state, "sources": sources, "taken": taken}
        raise ValueError(f"block {blocks}: that position is too long ago")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let iterations begin at a position that `state_dict` returned."""
        self._start = state

    def __iter__(self) -> Iterator[dict[str, list[int]]]:
        settings: dict[str, Any] = self._settings
        streams = [
            SourceBlocks(source, self._encode, seed=f"{self._seed}-{number}", **settings)
            for number, source in enumerate(self._sources)
        ]
        for stream, state in zip(streams, self._start.get("sources", []), strict=False):
            stream.load_state_dict(state)
        states: deque[dict[str, Any]] = deque(maxlen=_WINDOWS_KEPT)
        self._states = states

        def make(window: int) -> tuple[dict[str, Any], list[NDArray[Any]]]:
            before = [stream.state_dict() for stream in streams]
            blocks = [next(streams[number]) for number in self._deal(streams)]
            random.Random(f"{self._seed}-window-{window}").shuffle(blocks)
            after = [stream.state_dict()["read"] for stream in streams]
            read = dict(zip(summary_keys(self._sources), after, strict=True))
            return {"window": window, "sources": before, "read": read}, blocks

        # One window ahead, so that training need not wait: encoding releases Python's lock.
        with ThreadPoolExecutor(1, "corpus") as pool:
            window, skip = self._start["window"], self._start["taken"]
            ahead = pool.submit(make, window)
            while True:
                state, blocks = ahead.result()
                window += 1
                ahead = pool.submit(make, window)
                states.append(state)
                for block in blocks[skip:]:
                    yield {"input_ids": block.tolist()}
                skip = 0

    def _deal(self, streams: list[SourceBlocks]) -> list[int]:
        """Return the sources of a window's blocks: always the one that is furthest behind."""
        given = [stream.read["tokens"] // stream.length for stream in streams]
        total, found = sum(source.weight for source in self._sources), []
        for _ in range(self._window):
            count = sum(given) + 1
            pairs = zip(self._sources, given, strict=True)
            behind = [count * source.weight / total - done for source, done in pairs]
            found.append(behind.index(max(behind)))
            given[found[-1]] += 1
        return found

    def as_dataset(self) -> IterableDataset:
        """Return the stream as an `IterableDataset`, for `Trainer`.

        With several processes, accelerate reads it in the first one and deals out the blocks.
        """
        features = datasets.Features({"input_ids": datasets.List(datasets.Value("int64"))})
        return datasets.IterableDataset.from_generator(self, features=features)

    def __call__(self) -> Iterator[dict[str, list[int]]]:
        """Return an iterator, as the generator function of `as_dataset`."""
        from torch.utils.data import get_worker_info

        if get_worker_info() is not None:  # a checkpoint could not save the worker's position
            raise FastDraftError(
                "dataloader_num_workers: must be 0 with a stream, which reads ahead by itself"
            )
        return iter(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> BlockStream:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return (object, ())  # `datasets` hashes its generators by their pickle
