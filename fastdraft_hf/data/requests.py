"""One text that the target is asked for: a prompt, how it is sampled, and the row it becomes."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Request:
    """One text the target shall write. ``prompt_ids`` go in exactly as they stand.

    Attributes:
        index: the row's number in its set; with the set's name it is the row's identity.
        temperature: 0 is greedy.
        top_p: nucleus that is sampled from; 1 is all of the distribution.
        sample: which of several samples of one prompt at one temperature.
    """

    index: int
    prompt_ids: tuple[int, ...]
    temperature: float
    seed: int
    max_new_tokens: int
    source: str
    top_p: float = 1.0
    sample: int = 0

    @property
    def prompt_hash(self) -> str:
        """A short digest of the prompt's ids, to find rows of one prompt again."""
        data = b"".join(i.to_bytes(4, "little") for i in self.prompt_ids)
        return hashlib.sha256(data).hexdigest()[:16]


def requests_for(
    prompts: Sequence[tuple[int, ...]],
    *,
    temperatures: Sequence[float],
    max_new_tokens: int,
    seed: int,
    source: str,
) -> list[Request]:
    """Number the prompts and deal the temperatures out to them in turn."""
    return [
        Request(
            index=index,
            prompt_ids=prompt,
            temperature=temperatures[index % len(temperatures)],
            # One seed a row, spread so that neighbouring recipes' seeds do not share rows.
            seed=(seed * 1_000_003 + index) % (2**31),
            max_new_tokens=max_new_tokens,
            source=source,
        )
        for index, prompt in enumerate(prompts)
    ]
