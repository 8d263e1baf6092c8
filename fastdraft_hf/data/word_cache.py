"""Byte-level BPE by words: a word that occurred before costs a look-up.

A byte-level tokenizer cuts text into words by a regular expression and merges within a word only,
so the ids of a text are those of its words, and a corpus has few different ones. What costs in the
library's own path is done per word and occurrence: cutting, offsets, merges. Here the same
expression cuts (in `regex`) and each different word goes through the library once.

It is only used where that is known to give the same ids: tokenizers whose parts are understood, and
of their texts those whose characters both regular-expression engines class alike. Everything else
goes to the library as it is.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

# GPT-2's expression, which ByteLevel(use_regex) cuts by.
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# The same after Digits(individual_digits): digits stand alone, and a run of spaces before one is
# a run at an end.
_GPT2_DIGITS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
# Characters that the two engines may class differently (control characters, letters of younger
# Unicode versions, case folds beyond ASCII).
_UNSURE = re.compile(
    r"[^\t\n\v\f\r\x20-\x7e\u00a1-\u017e\u0180-\u024f\u0370-\u0377\u037a-\u037f\u0384-\u03ff"
    r"\u0400-\u052f\u1e00-\u1fff\u2010-\u2027\u2030-\u205e\u2190-\u22ff\u2500-\u27bf\u3001-\u30ff"
    r"\u4e00-\u9fa5\uac00-\ud7a3\U0001f300-\U0001f64f]"
)
# The letter that stands for each byte in byte-level vocabularies: itself where it can be seen, else
# one of those from U+0100 on, in order.
_SEEN = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
_BYTE_LETTERS = {
    byte: 0x100 + number for number, byte in enumerate(b for b in range(256) if b not in _SEEN)
}
# Words kept; a corpus of natural language has far fewer that occur twice.
_MOST_WORDS = 1_000_000


class WordCache:
    """Encodes texts through `tokenizers`, one look-up a known word.

    Args:
        backend: a `tokenizers.Tokenizer`. Special tokens that stand in a text are text.
    """

    def __init__(self, backend: Any) -> None:
        backend.encode_special_tokens = True
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._known: dict[str, list[int]] = {}
        self._split, self._added, self._nfc = _understand(json.loads(backend.to_str()))

    @property
    def by_words(self) -> bool:
        """Whether this tokenizer is understood."""
        return self._split is not None

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of every text, as ``tokenizer(text, add_special_tokens=False)`` would.

        Different only where a special token's own text stands in a document: it stays text.
        """
        found: list[list[int]] = [[]] * len(texts)
        rest: list[int] = []
        words: list[tuple[int, list[str]]] = []
        new: dict[str, None] = {}
        known = self._known
        if len(known) > _MOST_WORDS:
            known.clear()
        for number, text in enumerate(texts):
            cut = self._cut(text)
            if cut is None:
                rest.append(number)
                continue
            words.append((number, cut))
            new.update(dict.fromkeys(word for word in cut if word not in known))
        self._learn(list(new))
        for number, cut in words:
            found[number] = list(chain.from_iterable(map(known.__getitem__, cut)))
        for number, ids in zip(rest, self._whole([texts[i] for i in rest]), strict=True):
            found[number] = ids
        return found

    def _cut(self, text: str) -> list[str] | None:
        if self._split is None or _UNSURE.search(text):
            return None
        if self._added is not None and self._added.search(text):
            return None
        if self._nfc and not unicodedata.is_normalized("NFC", text):
            return None
        cut = self._split(text)
        # An expression that leaves gaps is none that is understood.
        return cut if sum(map(len, cut)) == len(text) else None

    def _learn(self, words: list[str]) -> None:
        # Straight to the merges: a word needs no cutting, and its bytes are letters of theirs.
        merge = self._backend.model.tokenize
        for word in words:
            letters = word.encode().decode("latin-1").translate(_BYTE_LETTERS)
            self._known[word] = [token.id for token in merge(letters)]

    def _whole(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        encoded = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encoded]


_Split = Callable[[str], list[str]]


def _understand(parts: dict[str, Any]) -> tuple[_Split | None, re.Pattern[str] | None, bool]:
    """Return what cuts into words, what must not stand in a text, whether it must be in NFC."""
    nothing = (None, None, False)
    model, normalizer = parts["model"], parts["normalizer"]
    if model.get("type", "BPE") != "BPE" or model.get("dropout"):
        return nothing
    # One that joins or marks the pieces of a word would do so at every cut.
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        return nothing
    if normalizer is not None and normalizer["type"] != "NFC":
        return nothing
    expression = _expression(parts["pre_tokenizer"])
    if expression is None:
        return nothing
    import regex  # type: ignore[import-untyped]  # it comes with transformers

    try:
        split = regex.compile(expression).findall
    except regex.error:
        return nothing
    added = [t["content"] for t in parts["added_tokens"] if not t["special"]]
    loose = any(t[how] for t in parts["added_tokens"] for how in ("lstrip", "rstrip"))
    if loose:  # a token that takes the spaces around it
        return nothing
    pattern = re.compile("|".join(map(re.escape, added))) if added else None
    return split, pattern, normalizer is not None


def _expression(pre_tokenizer: Any) -> str | None:
    if pre_tokenizer is None:
        return None
    steps = (
        pre_tokenizer["pretokenizers"] if pre_tokenizer["type"] == "Sequence" else [pre_tokenizer]
    )
    *before, last = steps
    if last["type"] != "ByteLevel" or last["add_prefix_space"]:
        return None
    if last.get("use_regex", True):
        if not before:
            return _GPT2
        digits = [s for s in before if s["type"] == "Digits" and s["individual_digits"]]
        return _GPT2_DIGITS if len(before) == len(digits) == 1 else None
    if len(before) != 1 or before[0]["type"] != "Split" or before[0]["invert"]:
        return None
    pattern = before[0]["pattern"].get("Regex")
    if before[0]["behavior"] != "Isolated" or pattern is None or re.search(r"\((?!\?)", pattern):
        return None  # a group would be what `findall` returns
    return str(pattern)
