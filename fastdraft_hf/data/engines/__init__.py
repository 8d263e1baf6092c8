"""Engines through which the target generates: one small interface, several speeds."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

EngineName = Literal["auto", "openvino", "transformers"]


@dataclass(frozen=True, slots=True)
class Request:
    """One completion to generate. ``prompt_ids`` are used exactly as they are.

    Attributes:
        index: number of the row in its set.
        temperature: 0 is greedy.
        top_p: nucleus to sample from; 1 is the whole distribution.
    """

    index: int
    prompt_ids: tuple[int, ...]
    temperature: float
    seed: int
    max_new_tokens: int
    source: str
    top_p: float = 1.0

    @property
    def prompt_hash(self) -> str:
        """A short digest of the prompt's ids, equal for rows of one prompt."""
        data = b"".join(i.to_bytes(4, "little") for i in self.prompt_ids)
        return hashlib.sha256(data).hexdigest()[:16]


@dataclass(frozen=True)
class Completion:
    """The completion of one request: token ids as generated, never tokenized from text."""

    request: Request
    ids: tuple[int, ...]
    finish_reason: Literal["stop", "length"]


class Engine(Protocol):
    """Generates completions and yields them in any order, one per request."""

    name: str

    def generate(
        self, requests: Iterable[Request], on_tokens: Callable[[int], bool | None]
    ) -> Iterator[Completion]:
        """Yield one completion per request.

        Args:
            requests: read lazily; it may end early.
            on_tokens: called with the number of new tokens as they appear. If it returns True, the
                time is up: yield the beginnings of unfinished completions, if any, and return.
        """
        ...


def completed(request: Request, ids: Sequence[int], stop_ids: Collection[int]) -> Completion:
    """Return the completion that ends at the first stop token or at the length limit."""
    ids = ids[: request.max_new_tokens]
    for position, token in enumerate(ids):
        if token in stop_ids:
            return Completion(request, tuple(ids[: position + 1]), "stop")
    return Completion(request, tuple(ids), "length")
