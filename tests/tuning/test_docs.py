"""The page's table of settings is the settings."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from fastdraft_hf.tuning.config import TuneConfig

PAGE = Path(__file__).resolve().parents[2] / "docs" / "search.md"


def test_every_setting_is_documented_with_its_default() -> None:
    section = PAGE.read_text(encoding="utf-8").partition("## Settings")[2].partition("\n## ")[0]
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*?) \|", section, re.MULTILINE))
    fields = {f.name: getattr(TuneConfig(), f.name) for f in dataclasses.fields(TuneConfig)}
    assert list(rows) == list(fields)
    for name, default in fields.items():
        shown = rows[name].strip("`").replace(",", "")
        assert shown == ("empty" if default is None else str(default)), name
