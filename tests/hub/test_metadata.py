from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fastdraft_hf._card import read_source
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


SOURCE = {"model_id": "org/Target", "sha256": "0" * 64, "license": "mit"}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "cannot be read"),
        ("[]", "cannot be read"),
        (json.dumps({"model_id": "a/b"}), "cannot be read"),
        (json.dumps({**SOURCE, "model_id": 'x"); import os #'}), "is not a repository id"),
        (json.dumps({**SOURCE, "model_id": None}), "is not a repository id"),
        (json.dumps({**SOURCE, "sha256": "a\nb"}), "is not a SHA-256"),
        (json.dumps({**SOURCE, "license": "<b>"}), "the Hub has no license '<b>'"),
    ],
)
def test_the_source_of_a_converted_target_is_checked(
    content: str, said: str, tmp_path: Path
) -> None:
    file = tmp_path / "fastdraft_source.json"
    file.write_text(json.dumps(SOURCE), encoding="utf-8")
    assert read_source(file) == ("org/Target", f"sha256:{'0' * 64}", "mit")
    file.write_text(content, encoding="utf-8")
    with pytest.raises(FastDraftError, match=said):
        read_source(file)
