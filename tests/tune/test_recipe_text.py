from __future__ import annotations

from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from fastdraft_hf import FastDraftError
from fastdraft_hf.tune.recipe_text import set_values

VALUES = {"design": {"params": 5, "hidden_size": 64}, "bench": {"num_assistant_tokens": [2, 3]}}

TEXTS = [
    "",
    "target: a\n",
    "target: a",
    "design:\n",
    "design: {}\n".replace("{}", "null"),
    "design:\n  params: 10M  # why\n  hidden_size: 1\nbench: {repeats: 2}\n",
    "bench:\n  num_assistant_tokens:\n    - 1\n    - 2\n  repeats: 1\ndesign:\n    params: 1\n",
    "bench:\n  repeats: 1\n  num_assistant_tokens: [1,\n    2]\n# the end\n",
    "design: {params: 3, init: scratch}  # in a line\nseed: 1\n",
]


@pytest.mark.parametrize("text", TEXTS)
def test_values_are_set_and_everything_else_stays(text: str) -> None:
    before = yaml.safe_load(text) or {}
    changed = set_values(text, VALUES)
    wanted = {k: v for k, v in before.items() if v is not None}
    for section, values in VALUES.items():
        wanted[section] = {**(wanted.get(section) or {}), **values}
    assert yaml.safe_load(changed) == wanted
    for line in text.splitlines():
        comment = line.partition("#")[2]
        assert comment in changed
    assert set_values(changed, VALUES) == changed  # what is there already is left alone


@given(
    st.dictionaries(
        st.sampled_from(["design", "bench", "seed_x"]),
        st.dictionaries(
            st.sampled_from(["params", "hidden_size", "a"]),
            st.one_of(st.integers(), st.text("ab#: '", max_size=6), st.lists(st.integers())),
            min_size=1,
        ),
    ),
    st.booleans(),
)
def test_any_written_recipe_is_changed_to_what_was_asked(data: dict[str, Any], flow: bool) -> None:
    text = yaml.safe_dump(data, default_flow_style=flow)
    if flow and not data:
        return
    if flow:  # one line for the whole recipe; sections are added to it in no style
        text = "".join(
            f"{k}: {yaml.safe_dump(v, default_flow_style=True)}" for k, v in data.items()
        )
    changed = yaml.safe_load(set_values(text, VALUES) if data else set_values("", VALUES))
    for section in {*data, *VALUES}:
        assert changed[section] == {**data.get(section, {}), **VALUES.get(section, {})}


@pytest.mark.parametrize("text", ["- a\n", "design: 5\n", "design: [1]\n", "a: {\n"])
def test_what_is_no_recipe_is_refused(text: str) -> None:
    with pytest.raises(FastDraftError):
        set_values(text, VALUES)
