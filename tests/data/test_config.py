from typing import Any

import pytest

from fastdraft_hf._errors import FastDraftError
from fastdraft_hf.data.config import GenerateConfig


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rows": 0}, "rows: must be at least 1, got 0"),
        ({"max_prompt_tokens": 0}, "max_prompt_tokens: must be at least 1"),
        ({"max_instruction_tokens": 0}, "max_instruction_tokens: must be at least 1"),
        ({"temperatures": []}, "temperatures: expected at least one entry"),
        ({"temperatures": [float("nan")]}, r"temperatures\[0\]: expected a finite number"),
        ({"instruction_temperatures": [0.0]}, r"instruction_temperatures\[0\]: must be above 0"),
        ({"top_p": 0.0}, "top_p: must be above 0, got 0.0"),
        ({"kind": "dataset"}, "dataset: kind dataset needs"),
        ({"dataset": "x"}, "dataset: only for kinds dataset and traffic"),
        ({"kind": "free", "system_prompt": "x"}, "system_prompt: kind free has no chats"),
        (
            {"system_prompt_in_answers": False, "kind": "code", "system_prompt": "x"},
            "system_prompt_in_answers: false needs kind magpie and a system_prompt",
        ),
        ({"near_duplicates": 2}, "near_duplicates: must be at most 1, got 2"),
    ],
)
def test_wrong_settings_are_named_with_their_path(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(FastDraftError, match=rf"^sets\.a\.{message}"):
        GenerateConfig(sets={"a": settings})


@pytest.mark.parametrize("name", ["../x", "a/b", "", ".hidden", "a b"])
def test_a_name_that_is_no_folder(name: str) -> None:
    with pytest.raises(FastDraftError, match=r"sets: .* cannot be a folder name"):
        GenerateConfig(sets={name: {}})
