import pytest
from transformers import PreTrainedTokenizerBase

from fastdraft_hf import FastDraftError
from fastdraft_hf.data.prompts import chat_ids
from fastdraft_hf.data.task_sets import load_task_set
from fastdraft_hf.eval.prompts import draw_prompts

TASKS = ["humaneval", "ifbench"]


def test_one_seed_draws_the_same_prompts(target_tokenizer: PreTrainedTokenizerBase) -> None:
    first = draw_prompts(target_tokenizer, TASKS, 3, 200, seed=5)
    assert first == draw_prompts(target_tokenizer, TASKS, 3, 200, seed=5)
    assert first != draw_prompts(target_tokenizer, TASKS, 3, 200, seed=6)
    assert [p.task for p in first] == ["humaneval", "ifbench"] * 3
    assert len({(p.task, p.key) for p in first}) == 6
    # A longer draw begins with the shorter one, so a larger budget adds prompts. Task sets take
    # turns, so a draw that is cut short has prompts of each.
    assert draw_prompts(target_tokenizer, ["ifbench"], 2, 200, seed=5) == first[1:4:2]


def test_prompts_are_the_held_out_ones_and_short_enough(
    target_tokenizer: PreTrainedTokenizerBase,
) -> None:
    drawn = draw_prompts(target_tokenizer, TASKS, 10_000, 150, seed=0)
    ids = [chat_ids(target_tokenizer, p.instruction) for task in TASKS for p in load_task_set(task)]
    assert sorted(p.ids for p in drawn) == sorted(one for one in ids if len(one) <= 150)


def test_no_prompt_is_short_enough(target_tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(FastDraftError, match=r"max_prompt_tokens: no prompt of humaneval .* 3 "):
        draw_prompts(target_tokenizer, TASKS, 2, 3, seed=0)
