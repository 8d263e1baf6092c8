from __future__ import annotations

import ast

from fastdraft_hf.data.heldout import load_task


def test_humaneval() -> None:
    prompts = load_task("humaneval")
    assert len(prompts) == 164
    assert prompts[0].key == "HumanEval/0"
    assert prompts[0].text.startswith("from typing import List")
    assert len({p.key for p in prompts}) == 164
    for prompt in prompts:
        assert prompt.text.rstrip() in prompt.instruction
        ast.parse(prompt.text + prompt.also)  # signature, solution and test belong together


def test_ifbench() -> None:
    prompts = load_task("ifbench")
    assert len(prompts) == 294
    assert all(p.text == p.instruction and p.text.strip() for p in prompts)
