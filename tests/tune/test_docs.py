"""The pages' tables of settings are the settings."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from fastdraft_hf.tune.config import ReducedVocabularyConfig, TuneConfig

DOCS = Path(__file__).resolve().parents[2] / "docs"


@pytest.mark.parametrize(
    ("page", "section"), [("search", TuneConfig), ("reduced-vocabulary", ReducedVocabularyConfig)]
)
def test_every_setting_is_documented_with_its_default(page: str, section: Any) -> None:
    text = (DOCS / f"{page}.md").read_text(encoding="utf-8")
    table = text.partition("## Settings")[2].partition("\n## ")[0]
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*?) \|", table, re.MULTILINE))
    fields = dict(section())
    assert list(rows) == list(fields)
    for name, default in fields.items():
        shown = rows[name].strip("`").replace(",", "")
        empty = default is None or (section is ReducedVocabularyConfig and default == [])
        assert shown == ("empty" if empty else str(default)), name
