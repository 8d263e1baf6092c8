from __future__ import annotations

import importlib.util

import pytest

from fastdraft_hf._errors import FastDraftError
from fastdraft_hf.data.filters import check_language, in_another_language

TEXTS = {
    "en": "The river runs through the old town and past the mill where nobody works any more.",
    "de": "Der Fluss fließt durch die alte Stadt und an der Mühle vorbei, in der keiner arbeitet.",
    "fr": "La rivière traverse la vieille ville et passe devant le moulin où nul ne travaille.",
    "es": "El río atraviesa la ciudad vieja y pasa por el molino donde ya no trabaja nadie.",
    "ja": "川は古い町を流れ、もう誰も働いていない水車小屋のそばを通り過ぎます。",
    "ru": "Река течёт через старый город мимо мельницы, где больше никто не работает.",
}


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("wanted", TEXTS)
def test_only_another_language_is_wrong(text: str, wanted: str) -> None:
    assert in_another_language(TEXTS[text], wanted) == (text != wanted)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "12 + 30 = 42",
        "Sí, claro.",  # too short to be sure
        "```python\ndef f(x):\n    return sorted(set(x))[-1]\n```",
        "```python\ndef unfinished(x):\n    return sorted(set(x))[-1] or unfinished(x - 1)",
    ],
)
def test_what_cannot_be_judged_is_not_wrong(text: str) -> None:
    assert not in_another_language(text, "en")
    assert not in_another_language(text, "de")


def test_a_word_in_another_language_does_not_make_the_text_so() -> None:
    text = (
        'In Spanish one says "buenos días" in the morning, and "buenas noches" before going to bed.'
    )
    assert not in_another_language(text, "en")


def test_words_around_code_are_what_is_judged() -> None:
    code = "```python\nfor the_word in the_list_of_words:\n    print(the_word)\n```"
    assert in_another_language(f"{TEXTS['de']}\n{code}\n{TEXTS['de']}", "en")
    assert not in_another_language(f"{TEXTS['en']}\n{code}", "en")


def test_a_code_that_is_no_language() -> None:
    check_language("en")
    with pytest.raises(FastDraftError, match="py3langid does not know 'english'"):
        check_language("english")


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FastDraftError, match=r"pip install fastdraft_hf\[language\]"):
        check_language("en")
