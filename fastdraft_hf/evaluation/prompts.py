"""The drawn evaluation prompts as token ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fastdraft_hf._errors import FastDraftError
from fastdraft_hf.data.heldout import sample_task
from fastdraft_hf.data.prompts import chat_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class EvaluationPrompt:
    """A held-out prompt as the target reads it."""

    task: str
    key: str
    ids: tuple[int, ...]


def draw_prompts(
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    per_task: int,
    max_tokens: int,
    seed: int,
) -> list[EvaluationPrompt]:
    """Return ``per_task`` prompts of every task set, the same ones for the same seed.

    Raises:
        FastDraftError: a task set has no prompt short enough.
    """
    drawn = []
    for task in tasks:
        chosen = []
        for prompt in sample_task(task, None, seed):
            ids = chat_ids(tokenizer, prompt.instruction)
            if len(ids) <= max_tokens:
                chosen.append(EvaluationPrompt(task, prompt.key, ids))
            if len(chosen) == per_task:
                break
        if not chosen:
            raise FastDraftError(
                f"max_prompt_tokens: no prompt of {task} is as short as {max_tokens} tokens"
            )
        drawn += chosen
    return drawn
