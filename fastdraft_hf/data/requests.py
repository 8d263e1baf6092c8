"""One text that the target is asked for: a prompt, how it is sampled, and the row it becomes."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal


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
    temperatures_per_prompt: Literal["one", "all"] = "one",
    samples: int = 1,
    top_p: float = 1.0,
) -> list[Request]:
    """Number what is asked for: every (prompt, temperature, sample) once, prompt by prompt.

    Args:
        prompts: token ids.
        temperatures: 0 is greedy.
        max_new_tokens: longest text.
        seed: of the set; every row gets one of its own from it.
        source: the set's name.
        temperatures_per_prompt: ``one`` deals the temperatures out to the prompts in turn; ``all``
            asks for each prompt at each of them.
        samples: texts of one prompt at one temperature; greedy ones are all alike, so there is one.
        top_p: nucleus that is sampled from.
    """
    asked = []
    for number, prompt in enumerate(prompts):
        if temperatures_per_prompt == "all":
            chosen = list(temperatures)
        else:
            chosen = [temperatures[number % len(temperatures)]]
        asked += [
            (prompt, temperature, sample)
            for temperature in chosen
            for sample in range(samples if temperature > 0 else 1)
        ]
    return [
        Request(
            index=index,
            prompt_ids=prompt,
            temperature=temperature,
            # One seed a row, spread so that neighbouring recipes' seeds do not share rows.
            seed=(seed * 1_000_003 + index) % (2**31),
            max_new_tokens=max_new_tokens,
            source=source,
            top_p=top_p if temperature > 0 else 1.0,
            sample=sample,
        )
        for index, (prompt, temperature, sample) in enumerate(asked)
    ]
