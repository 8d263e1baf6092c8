"""Keeps evaluation text out of training text: any shared run of 13 words drops the document.

Thirteen words is the overlap that GPT-3's data check used (Brown et al. 2020, appendix C).
A held-out text shorter than that is matched whole.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from fastdraft_hf.data.heldout import TASK_NAMES, load_task

NGRAM = 13

_WORD = re.compile(r"[a-z0-9_]+")


class Decontaminator:
    """Answers whether a text shares a run of words with any held-out text.

    Args:
        held_out: the texts that must not be trained on.
        n: the length of the run, in words.
    """

    def __init__(self, held_out: Iterable[str], n: int = NGRAM) -> None:
        self.n = n
        self._grams: set[tuple[str, ...]] = set()
        self._short: dict[int, set[tuple[str, ...]]] = {}
        for text in held_out:
            words = _words(text)
            if not words:
                continue
            if len(words) < n:
                # Fewer than five words ("return True") say nothing about where a text is from.
                if len(words) >= 5:
                    self._short.setdefault(len(words), set()).add(tuple(words))
                continue
            self._grams.update(_runs(words, n))

    @classmethod
    def of_task_sets(cls, names: Iterable[str] = TASK_NAMES) -> Decontaminator:
        """Build the check for whole task sets: prompts, reference solutions and tests."""
        texts = []
        for name in names:
            for prompt in load_task(name):
                texts += [prompt.text, prompt.also]
        return cls(texts)

    def overlaps(self, text: str) -> bool:
        """Return whether ``text`` shares ``n`` words in a row with a held-out text."""
        words = _words(text)
        if any(run in self._grams for run in _runs(words, self.n)):
            return True
        return any(
            run in grams for length, grams in self._short.items() for run in _runs(words, length)
        )


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _runs(words: list[str], n: int) -> Iterable[tuple[str, ...]]:
    return zip(*(words[i:] for i in range(n)), strict=False)
