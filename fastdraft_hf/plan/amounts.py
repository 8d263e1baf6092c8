"""How much of everything a recipe asks for: rows, tokens, answers; no time yet."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fastdraft_hf.data.config import GeneratedSet
from fastdraft_hf.eval import bench, evaluate
from fastdraft_hf.eval.bench import Setting
from fastdraft_hf.recipe import Recipe, logits_sets

# What texts turn out to be, as measured on the quickstart (docs/plan.md); a chattier target writes
# longer. Shares are of the longest text that is allowed.
LENGTH_SHARE = {"free": 0.86, "magpie": 0.75, "code": 0.58, "passages": 0.58}
OTHER_LENGTH_SHARE = 0.75
INSTRUCTION_SHARE = 0.52
KEPT_INSTRUCTIONS = 0.74
PROMPT_TOKENS = {"free": 1, "magpie": 85, "code": 70, "passages": 90}
OTHER_PROMPT_TOKENS = 120
INSTRUCTION_PREFIX = 30
EVALUATION_PROMPT = 150

ASSUMPTIONS = (
    "a text is 86% (free), 75% (magpie) or 58% (code, passages) as long as it may be, 74% of "
    "Magpie's instructions are kept, and an evaluation prompt has 150 tokens: as in the quickstart"
)


@dataclass(frozen=True)
class Writing:
    """One pass of the target over prompts.

    Attributes:
        name: of the set; Magpie's instructions are a pass of their own.
        rows: texts.
        prompt: tokens read a row.
        tokens: tokens written a row, on average.
        longest: tokens a row may have.
        max_seconds: when no new row is started any more.
    """

    name: str
    rows: float
    prompt: float
    tokens: float
    longest: int
    max_seconds: float | None


def writings(name: str, wanted: GeneratedSet) -> list[Writing]:
    """Return the passes of a set. Magpie's answers follow the instructions that are kept."""
    seconds = None if wanted.max_minutes is None else 60 * wanted.max_minutes
    rows, prompt = float(wanted.rows), PROMPT_TOKENS.get(wanted.kind, OTHER_PROMPT_TOKENS)
    # Settings of later versions; one text a prompt without them.
    texts = 1.0
    if getattr(wanted, "temperatures_per_prompt", "one") == "all":
        texts = float(len(wanted.temperatures))
    texts *= getattr(wanted, "samples", 1)
    found = []
    if wanted.kind == "magpie":
        longest = wanted.max_instruction_tokens
        found.append(
            Writing(
                f"{name}-instructions",
                rows,
                INSTRUCTION_PREFIX,
                INSTRUCTION_SHARE * longest,
                longest,
                seconds,
            )
        )
        rows *= KEPT_INSTRUCTIONS
    share = LENGTH_SHARE.get(wanted.kind, OTHER_LENGTH_SHARE)
    found.append(
        Writing(
            name,
            rows * texts,
            prompt,
            share * wanted.max_new_tokens,
            wanted.max_new_tokens,
            seconds,
        )
    )
    return found


def shards(rows: float, rows_per_shard: int) -> int:
    """Return how many shards hold so many rows."""
    return math.ceil(rows / rows_per_shard)


def busiest_rows(rows: float, rows_per_shard: int, processes: int) -> float:
    """Return the rows of the process that has most: shard k is process k's, modulo their number."""
    return min(rows, float(math.ceil(shards(rows, rows_per_shard) / processes) * rows_per_shard))


def stored_sets(recipe: Recipe) -> list[str]:
    """Return the sets whose distributions stage logits stores."""
    return logits_sets(recipe) if recipe.logits is not None else []


@dataclass(frozen=True)
class Answers:
    """Answers of one kind that evaluate or bench decode.

    Attributes:
        setting: path and γ, as bench names them.
        count: prompts times repeats.
        assisted: whether the draft is the trained one (its acceptance is the assumed one).
    """

    setting: Setting
    count: int
    assisted: bool = True


def evaluation_answers(recipe: Recipe) -> list[Answers]:
    """Return what stage evaluate decodes."""
    config = recipe.evaluate
    tasks = len(config.tasks)
    prompts = tasks * config.prompts_per_task
    found = [Answers(Setting("alone"), prompts, assisted=False)]
    for setting in evaluate.settings_of(config):
        found.append(Answers(Setting(config.path, "", setting.num_assistant_tokens), prompts))
    if recipe.design.draft is None and recipe.training_stages():
        few = tasks * min(config.untrained_prompts_per_task, config.prompts_per_task)
        untrained = Setting(config.path, "", config.gammas[0])
        found.append(Answers(untrained, few, assisted=False))
    return found


def bench_answers(recipe: Recipe) -> list[Answers]:
    """Return what stage bench decodes, warm-ups left out."""
    config = recipe.bench
    count = len(config.tasks) * config.prompts_per_task * config.repeats
    paths = list(dict.fromkeys(config.paths))
    assisted = bench.assisted_settings(
        paths,
        config.num_assistant_tokens,
        list(config.drafts),
        paths if recipe.reduced_vocabulary is not None else (),
    )
    return [
        Answers(setting, count, assisted=setting.num_assistant_tokens > 0)
        for setting in bench.all_settings(assisted)
    ]
