"""Is a text in the language that was asked for: by py3langid, an optional extra.

The classifier (Lui and Baldwin 2012, langid.py, in its maintained fork) is a naive Bayes over byte
n-grams: one model for some 140 languages, no network. Code is no language, and short or mixed
texts are uncertain, so only what is surely another language is called wrong.
"""

from __future__ import annotations

import importlib.util
import re
from typing import Any

from fastdraft_hf._errors import FastDraftError, nearest

# Fewer letters than this, code left out, are not judged.
LETTERS = 20
# How sure the classifier must be that it is another language.
CONFIDENCE = 0.8

_FENCED = re.compile(r"```.*?(?:```|\Z)", re.DOTALL)
_identifiers: list[Any] = []


def _identifier() -> Any:
    if not _identifiers:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier

        _identifiers.append(LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True))
    return _identifiers[0]


def check_language(code: str) -> None:
    """Raise `FastDraftError` when the extra is missing or the code is none it knows."""
    if importlib.util.find_spec("py3langid") is None:
        raise FastDraftError(
            "language: py3langid is not installed; `pip install fastdraft_hf[language]`"
        )
    labels = _identifier().labels
    if code not in labels:
        raise FastDraftError(
            f"language: '{code}' is no language code that py3langid knows{nearest(code, labels)}; "
            "most are of two letters (ISO 639-1: en, de, zh)"
        )


def in_another_language(text: str, code: str) -> bool:
    """Return whether ``text`` is surely not in the language ``code``.

    Args:
        text: what is judged; fenced code blocks are left out.
        code: as `check_language` accepts it.
    """
    prose = _FENCED.sub(" ", text)
    if sum(map(str.isalpha, prose)) < LETTERS:
        return False
    found, confidence = _identifier().classify(prose)
    return bool(found != code and confidence >= CONFIDENCE)
