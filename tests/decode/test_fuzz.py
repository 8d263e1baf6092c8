"""Families × settings × batches × γ: the text, and the scores, of the target alone.

A sample runs by default and everything with ``-m slow``. Sampling is tested against the exact
distribution in `test_sampling_is_exact.py`.
"""

import itertools
import random
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    SynthIDTextWatermarkingConfig,
    WatermarkingConfig,
)
from transformers.generation.stopping_criteria import ConfidenceCriteria
from zoo import FAMILIES, noisy_draft, prompts, tiny

from fastdraft_hf import assisted_decoding
from fastdraft_hf.decode.settings import set_draft_length

Settings = dict[str, Any]
NEW_TOKENS = 16
SCORES = {"return_dict_in_generate": True, "output_scores": True}


class Script(LogitsProcessor):
    """Dictates the first tokens: a processor with a cursor, as a grammar or a budget has."""

    def __init__(self) -> None:
        self.cursor, self.script = 0, [9, 17, 33, 12, 40]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if self.cursor < len(self.script):
            dictated = torch.full_like(scores, float("-inf"))
            dictated[:, self.script[self.cursor]] = 0
            self.cursor += 1
            return dictated
        return scores


class Countdown(LogitsProcessor):
    """Forces the end token at its twelfth call, and fails at the one after."""

    def __init__(self) -> None:
        self.left = 12

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.left -= 1
        if self.left < 0:
            raise AssertionError("called after the last token")
        if self.left == 0:
            scores = scores.clone()
            scores[:, 2] = 1e4
        return scores


class Length(StoppingCriteria):
    """Stops after nine tokens, and reads as many scores as there are new tokens."""

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        done = input_ids.shape[1] >= PROMPT + 9
        if scores is not None and len(scores) != input_ids.shape[1] - PROMPT:
            raise AssertionError("the newest scores are missing")
        return torch.full((input_ids.shape[0],), done)


PROMPT = 10
# Called for every run, so that processors and criteria with a state are new.
SETTINGS: dict[str, Callable[[], Settings]] = {
    "greedy": dict,
    "scores": lambda: {**SCORES, "output_logits": True},
    "no end token": lambda: {"eos_token_id": None},
    "several end tokens": lambda: {"eos_token_id": [2, 7, 11, 30]},
    "repetition penalty": lambda: {"repetition_penalty": 1.3},
    "repetition penalty and scores": lambda: {"repetition_penalty": 1.3, **SCORES},
    "no repeated n-grams": lambda: {"no_repeat_ngram_size": 2},
    "bad words": lambda: {"bad_words_ids": [[9], [17, 33]]},
    "least length": lambda: {"min_new_tokens": 10},
    "forced end": lambda: {"forced_eos_token_id": 2},
    "suppressed tokens": lambda: {"suppress_tokens": [9, 17, 33]},
    "bias": lambda: {"sequence_bias": [[[50], 4.0]]},
    "watermark": lambda: {"watermarking_config": WatermarkingConfig(bias=3.0)},
    "SynthID": lambda: {
        "watermarking_config": SynthIDTextWatermarkingConfig(keys=[1, 2, 3, 4], ngram_len=3)
    },
    "guidance": lambda: {"guidance_scale": 1.7},
    "script": lambda: {"logits_processor": LogitsProcessorList([Script()])},
    "countdown": lambda: {"logits_processor": LogitsProcessorList([Countdown()])},
    "criterion": lambda: {"stopping_criteria": StoppingCriteriaList([Length()])},
    "criterion that reads scores": lambda: {
        "stopping_criteria": StoppingCriteriaList([Length()]),
        **SCORES,
    },
    "confidence criterion": lambda: {
        "stopping_criteria": StoppingCriteriaList([ConfidenceCriteria(0.3)]),
        **SCORES,
    },
    "hidden states": lambda: {"return_dict_in_generate": True, "output_hidden_states": True},
    "attentions": lambda: {"return_dict_in_generate": True, "output_attentions": True},
    "hidden states and guidance": lambda: {
        "return_dict_in_generate": True,
        "output_hidden_states": True,
        "guidance_scale": 1.7,
    },
    "no cache": lambda: {"use_cache": False},
    "beams": lambda: {"num_beams": 2},
    "embeddings": lambda: {"embeddings": True},
}
COST = -1  # the schedule instead of a γ, which copies too
COPIES = -2  # γ = 3, and prompt lookup wherever a token comes again
GAMMAS = (1, 3, 8, 150, COST, COPIES)
CASES = [
    (family, name, rows)
    for family, name in itertools.product(FAMILIES, SETTINGS)
    for rows in (1, 3)
]
# One family with everything, and of the others a few cases each.
SAMPLE = [case for case in CASES if case[0] == "llama"]
_rng = random.Random(0)
for _family in FAMILIES:
    SAMPLE += _rng.sample([case for case in CASES if case[0] == _family != "llama"] or SAMPLE, 3)
SAMPLE += [("gpt_neo", "greedy", 3), ("lfm2", "greedy", 1), ("bloom", "guidance", 1)]


def run(family: str, setting: Settings, rows: int, gamma: int | None = None) -> Any:
    """Call ``generate`` alone, or through our loop with a draft."""
    target, given = tiny(family), prompts(rows, PROMPT)
    if setting.pop("embeddings", False):
        ids = given.pop("input_ids")
        given["inputs_embeds"] = target.get_input_embeddings()(ids).detach()
    fields = {"do_sample": False, "max_new_tokens": NEW_TOKENS, **setting}
    if gamma is not None:
        draft = noisy_draft(family)
        set_draft_length(draft.generation_config, gamma)
        if gamma in (COPIES, COST):
            set_draft_length(draft.generation_config, 3, 1)
        if gamma == COST:
            draft.generation_config.num_assistant_tokens_schedule = "cost"
        fields |= {"assistant_model": draft, "custom_generate": assisted_decoding}
    torch.manual_seed(0)
    return target.generate(**given, **fields)


def check(family: str, name: str, rows: int, gamma: int) -> None:
    try:
        alone = run(family, SETTINGS[name](), rows)
    except Exception as error:  # what the family cannot do at all
        pytest.skip(f"the target alone, {family}, {name}: {type(error).__name__}")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            ours = run(family, SETTINGS[name](), rows, gamma)
        except ValueError as error:  # one clear refusal, before any work
            if "stateful" not in str(error):
                raise
            return
    warned = [str(w.message) for w in caught if "assisted_decoding" in str(w.message)]
    assert len(warned) <= 1, warned
    texts = [getattr(output, "sequences", output) for output in (alone, ours)]
    assert torch.equal(*texts), (gamma, warned, *(text.tolist() for text in texts))
    for kind in ("scores", "logits"):
        steps = getattr(alone, kind, None)
        if steps is None or warned:
            continue
        ended = torch.zeros(rows, dtype=torch.bool)
        for step, (one, other) in enumerate(zip(steps, ours[kind], strict=True)):
            # What comes after a row's end does not matter.
            assert torch.allclose(one[~ended], other[~ended], atol=2e-3), (kind, step)
            ended |= texts[0][:, PROMPT + step] == 2


@pytest.mark.parametrize(("family", "name", "rows"), dict.fromkeys(SAMPLE))
def test_a_sample(family: str, name: str, rows: int) -> None:
    check(family, name, rows, 3)
    check(family, name, rows, COPIES)


def test_more_drafted_tokens_than_the_text_has() -> None:
    check("llama", "no end token", 1, 150)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_everything(family: str, subtests: Any) -> None:
    for name, rows, gamma in itertools.product(SETTINGS, (1, 3), GAMMAS):
        with subtests.test(name=name, rows=rows, gamma=gamma):
            check(family, name, rows, gamma)
