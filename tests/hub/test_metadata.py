from __future__ import annotations

import copy
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastdraft_hf._errors import FastDraftError
from fastdraft_hf.hub.metadata import LICENSES, check_metadata
from fastdraft_hf.recipe import build_recipe

GOOD: dict[str, Any] = {
    "license": "apache-2.0",
    "language": ["en", "deu", "code"],
    "base_model": "org/Target",
    "datasets": ["user/data"],
    "tags": ["fastdraft"],
    "library_name": "transformers",
    "pipeline_tag": "text-generation",
    "model-index": [
        {
            "name": "draft",
            "results": [
                {
                    "task": {"type": "text-generation"},
                    "dataset": {"type": "openai/openai_humaneval", "name": "humaneval"},
                    "metrics": [{"type": "acceptance_rate", "value": 0.4}],
                }
            ],
        }
    ],
}


def test_what_is_good() -> None:
    check_metadata(GOOD)
    check_metadata({})
    check_metadata({"license": "other", "license_name": "own", "license_link": "LICENSE"})
    assert {"apache-2.0", "mit", "llama3.1", "gemma", "other"} <= LICENSES


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("license", "Apache 2.0", "license: the Hub knows no license 'Apache 2.0' .did you mean"),
        ("license", "my-own", "license: the Hub knows no license 'my-own'"),
        ("license", "other", "license_name: needed, since license is other"),
        ("license", 7, "license: expected a text or a list of texts, got 7"),
        ("language", ["english"], "language: 'english' is no language code"),
        ("language", "EN", "language: 'EN' is no language code"),
        ("base_model", "a b", "base_model: 'a b' is no id of the Hub"),
        ("datasets", ["a//b"], "datasets: 'a//b' is no id of the Hub"),
        ("base_model_relation", "draft", "base_model_relation: 'draft' is not one of adapter"),
        ("tags", ["ok", ""], "tags: '' is no tag"),
        ("tags", "one, two\n", "is no tag"),
        ("pipeline_tag", "Text Generation", "pipeline_tag: 'Text Generation' is no name"),
        ("library_name", 3, "library_name: 3 is no name"),
        ("model-index", {}, "model-index: expected a list"),
        ("model-index", [{"results": []}], r"model-index\[0\].name: a text is needed, got None"),
        ("model-index", [{"name": "x"}], r"model-index\[0\].results: expected a list of results"),
    ],
)
def test_what_is_refused_names_the_key(key: str, value: Any, said: str) -> None:
    with pytest.raises(FastDraftError, match=said):
        check_metadata({**GOOD, key: value})


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        (("task",), {}, "task.type: a text is needed"),
        (("dataset", "type"), "my set", "dataset.type: 'my set' cannot be the id"),
        (("dataset", "name"), "", "dataset.name: a text is needed"),
        (("metrics",), [], "metrics: expected a list of metrics"),
        (("metrics", 0, "value"), float("nan"), r"metrics\[0\].value: nan is no value"),
        (("metrics", 0, "value"), None, r"metrics\[0\].value: None is no value"),
    ],
)
def test_a_result_the_hub_would_not_show(place: tuple[Any, ...], value: Any, said: str) -> None:
    data = copy.deepcopy(GOOD)
    part = data["model-index"][0]["results"][0]
    for key in place[:-1]:
        part = part[key]
    part[place[-1]] = value
    with pytest.raises(FastDraftError, match=said):
        check_metadata(data)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)


@given(key=st.sampled_from(sorted(GOOD)), value=JSON)
def test_nothing_but_a_clear_error_comes_out(key: str, value: Any) -> None:
    try:
        check_metadata({**GOOD, key: value})
    except FastDraftError as error:
        assert str(error).startswith("README.md: ")  # noqa: PT017


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"license": "apache"}, "card.license: the Hub knows no license 'apache'"),
        ({"base_model": "a/b/c"}, "card.base_model: 'a/b/c' is no id"),
        ({"language": ["english"]}, "card.language: 'english' is no language code"),
    ],
)
def test_a_recipe_is_refused_before_any_work(section: dict[str, Any], said: str) -> None:
    with pytest.raises(FastDraftError, match=said):
        build_recipe({"card": section})
