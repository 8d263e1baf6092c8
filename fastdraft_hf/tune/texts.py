"""Completions that a draft's acceptance is measured on, and the measurement."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

from fastdraft_hf._errors import FastDraftError
from fastdraft_hf._progress import Progress
from fastdraft_hf.data.filters import read_kept_rows
from fastdraft_hf.eval.expected import Continuation, TextAcceptance, text_acceptance

# One row in so many is held out: no probe trains on it and no vocabulary counts it.
_ONE_IN = 5
# What is read of a completion, and the longest prompt before it, in tokens.
MAX_NEW_TOKENS, _LONGEST_PROMPT = 128, 512

# A completion and the temperature it was sampled at.
Sampled = tuple[Continuation, float]


def held_out(index: int) -> bool:
    """Return whether the row of this index is held out."""
    return index % _ONE_IN == 0


def sampled_completions(sets: Sequence[Path], count: int, seed: int) -> list[Sampled]:
    """Return up to ``count`` held-out completions, from the sets in turn.

    Greedy ones are left out: at temperature 0 there is no distribution to compare.

    Raises:
        FastDraftError: there is none, or a folder is not a finished set.
    """
    pools = []
    for folder in sets:
        pool = []
        for row in read_kept_rows(folder)[0]:
            short = len(row["prompt_ids"]) <= _LONGEST_PROMPT
            if held_out(row["index"]) and row["temperature"] > 0 and short:
                ids = tuple(row["completion_ids"][:MAX_NEW_TOKENS])
                text = Continuation(folder.name, tuple(row["prompt_ids"]), ids)
                pool.append((text, round(float(row["temperature"]), 4)))
        random.Random(seed).shuffle(pool)
        pools.append(pool)
    most = max(map(len, pools), default=0)
    found = [pool[n] for n in range(most) for pool in pools if n < len(pool)][:count]
    if not found:
        names = ", ".join(map(str, sets))
        raise FastDraftError(
            f"rows: {names}: no held-out completion was sampled at a temperature above 0"
        )
    return found


def read_acceptance(
    target: Path, drafts: Sequence[Path], texts: Sequence[Sampled], device: str = "cpu"
) -> list[list[TextAcceptance]]:
    """Return each draft's acceptance along every completion, read by both models in float32.

    Args:
        target: the target's folder.
        drafts: folders of drafts; a reduced vocabulary is used.
        texts: completions and their temperatures.
        device: cpu or cuda.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from fastdraft_hf.draft.reduced_vocabulary import load_draft

    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).to(device).eval()
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    found: list[list[TextAcceptance]] = []
    with Progress("reading completions", len(drafts) * len(texts), "completions") as progress:
        for folder in drafts:
            draft = load_draft(folder, dtype=torch.float32).to(device).eval()
            found.append([])
            for text, temperature in texts:
                found[-1].append(text_acceptance(model, draft, text, temperature, ends))
                progress.advance(1)
    return found
