"""Held-out prompts as token ids."""

import itertools
import random
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from fastdraft_hf._errors import FastDraftError
from fastdraft_hf.data.prompts import chat_ids
from fastdraft_hf.data.task_sets import Tasks, load_task_set, settings_of


@dataclass(frozen=True)
class EvaluationPrompt:
    """A held-out prompt as the target reads it."""

    task: str
    key: str
    ids: tuple[int, ...]


def draw_prompts(
    tokenizer: PreTrainedTokenizerBase,
    tasks: Tasks,
    per_task: int,
    max_tokens: int,
    seed: int,
) -> list[EvaluationPrompt]:
    """Return ``per_task`` prompts of every task set, the same ones for the same seed.

    The task sets take turns, so that a measurement that runs out of time has prompts of each. A set
    may have fewer than ``per_task``; prompts of more than ``max_tokens`` tokens are skipped.

    Raises:
        FastDraftError: a task set cannot be read, or all its prompts are too long.
    """
    drawn = []
    for task, settings in settings_of(tasks):
        chosen: list[EvaluationPrompt] = []
        prompts = load_task_set(task, settings)
        for prompt in random.Random(seed).sample(prompts, len(prompts)):
            if prompt.exchange is not None:
                ids = prompt.exchange.ids(tokenizer)[0]
            else:
                ids = chat_ids(tokenizer, prompt.instruction)
            if len(ids) <= max_tokens:
                chosen.append(EvaluationPrompt(task, prompt.key, ids))
            if len(chosen) == per_task:
                break
        if not chosen:
            raise FastDraftError(
                f"max_prompt_tokens: no prompt of {task} is as short as {max_tokens} tokens"
            )
        drawn.append(chosen)
    turns = itertools.chain.from_iterable(itertools.zip_longest(*drawn))
    return [prompt for prompt in turns if prompt is not None]
