"""Keeps evaluation text out of training text: a shared run of 13 words drops the document.

GPT-3's check used 13 words (Brown et al. 2020, appendix C). Shorter held-out texts are matched
whole.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from fastdraft_hf.data.task_sets import TASK_NAMES, Tasks, digest, load_task_set, settings_of

NGRAM = 13
SHORTEST = 5

_WORD = re.compile(r"[a-z0-9_]+")


class Decontaminator:
    """Finds texts that share a run of words with a held-out text.

    Args:
        held_out: texts that must not be trained on.

    Attributes:
        held_out: digests of its task sets, by name.
    """

    def __init__(self, held_out: Iterable[str]) -> None:
        self.held_out: dict[str, list[str]] = {}
        # Runs by their first words: 13 in a row, and texts of 5 to 12 whole. Fewer than five words
        # ("return True") are no sign of contamination.
        self._runs: dict[tuple[str, ...], set[tuple[str, ...]]] = {}
        for words in map(_words, held_out):
            for run in _runs(words, min(len(words), NGRAM)) if len(words) >= SHORTEST else ():
                self._runs.setdefault(run[:SHORTEST], set()).add(run)

    @classmethod
    def of_task_sets(cls, *evaluated: Tasks) -> Decontaminator:
        """Return the check for whole task sets: prompts, reference solutions and tests.

        Args:
            *evaluated: the tasks of ``evaluate`` and ``bench``. HumanEval and IFBench are always
                held out.
        """
        texts: list[str] = []
        held_out: dict[str, list[str]] = {}
        for name, settings in [e for t in (TASK_NAMES, *evaluated) for e in settings_of(t)]:
            prompts = load_task_set(name, settings)
            if (key := digest(prompts)) not in held_out.setdefault(name, []):
                held_out[name].append(key)
                texts += [text for prompt in prompts for text in (prompt.text, prompt.also)]
        found = cls(texts)
        found.held_out = held_out
        return found

    def overlaps(self, text: str) -> bool:
        """Return whether ``text`` shares `NGRAM` words in a row with a held-out text."""
        words = _words(text)
        return any(
            tuple(words[start : start + len(run)]) == run
            for start, first in enumerate(_runs(words, SHORTEST))
            for run in self._runs.get(first, ())
        )


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _runs(words: list[str], n: int) -> Iterable[tuple[str, ...]]:
    return zip(*(words[i:] for i in range(n)), strict=False)
