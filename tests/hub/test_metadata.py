from __future__ import annotations

from typing import Any

import pytest

from fastdraft_hf._errors import FastDraftError
from fastdraft_hf.recipe import build_recipe


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"license": "apache"}, "card.license: the Hub has no license 'apache'"),
        ({"base_model": "a/b/c"}, "card.base_model: 'a/b/c' is not a repository id"),
        ({"language": ["english"]}, "card.language: 'english' is not a language code"),
    ],
)
def test_a_recipe_is_refused_before_any_work(section: dict[str, Any], said: str) -> None:
    with pytest.raises(FastDraftError, match=said):
        build_recipe({"card": section})
    with pytest.raises(FastDraftError, match=r"target: .* has a control character"):
        build_recipe({"target": "models/a\nb"})
