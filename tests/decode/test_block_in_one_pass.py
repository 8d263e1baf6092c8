"""A draft that drafts all of a block in one pass: the text is the target's own."""

import copy
import random
from typing import Any

import pytest
import torch
from decoding_helpers import padded, write
from test_sampling_is_exact import SETTINGS, exact, p_value, sample
from transformers import LlamaForCausalLM

from fastdraft_hf import FastDraftError
from fastdraft_hf.decode.assisted import record_rounds

MASK = 287


def parallel(draft: Any, mask: int = MASK) -> Any:
    draft = copy.deepcopy(draft)
    draft.config.pard_token = mask
    return draft


def test_greedy_output_is_the_targets(
    target: LlamaForCausalLM, neighbour: LlamaForCausalLM
) -> None:
    rng, draft = random.Random(0), parallel(neighbour)
    rounds: list[tuple[int, int]] = []
    for number in range(60):
        prompt = [[rng.randrange(3, 288) for _ in range(rng.randrange(1, 13))]]
        gamma, new = number % 8 + 1, number % 13 + 1
        alone = write(target, prompt, max_new_tokens=new)
        with record_rounds(target) as found:
            ours = write(target, prompt, draft, gamma, max_new_tokens=new)
        rounds += found
        assert torch.equal(ours, alone), (prompt, gamma, new)
    assert any(accepted for _, accepted in rounds)


@pytest.mark.parametrize("processor", [{}, {"repetition_penalty": 1.3}])
def test_rows_of_a_batch(
    target: LlamaForCausalLM, neighbour: LlamaForCausalLM, processor: dict[str, Any]
) -> None:
    rng, draft = random.Random(1), parallel(neighbour)
    for gamma in (1, 3, 6):
        prompts = [[rng.randrange(3, 288) for _ in range(rng.randrange(1, 9))] for _ in range(4)]
        ids, mask = padded(prompts)
        fields = {"attention_mask": mask, "max_new_tokens": 20, **processor}
        alone = write(target, ids, **fields)
        for copies in (0, 1):
            assert torch.equal(write(target, ids, draft, gamma, copies, **fields), alone)


def test_one_pass_of_the_draft_a_round(
    target: LlamaForCausalLM, neighbour: LlamaForCausalLM
) -> None:
    draft, widths = parallel(neighbour), []
    draft.register_forward_pre_hook(
        lambda _, args, given: widths.append(given["input_ids"].shape[1]), with_kwargs=True
    )
    with record_rounds(target) as rounds:
        write(target, [[5, 6, 7]], draft, 4, max_new_tokens=30)
    assert len(widths) in (len(rounds) - 1, len(rounds))  # the last token needs no draft
    assert widths[0] == 3 + 3  # the prompt; then what the last round added
    written = 0
    for (_, accepted), width in zip(rounds, widths[1:], strict=False):
        written += accepted + 1
        assert width == accepted + 1 + min(4, 30 - written - 1) - 1


@pytest.mark.parametrize(("rows", "name"), [(500, "plain"), (500, "temperature"), (1, "plain")])
def test_samples_are_the_targets(
    pair: tuple[LlamaForCausalLM, LlamaForCausalLM], rows: int, name: str
) -> None:
    target, draft = pair[0], parallel(pair[1], mask=0)
    runs = 10_000 if rows > 1 else 500
    found = sample(target, draft, SETTINGS[name], rows=rows, gamma=3, runs=runs)
    assert p_value(found, exact(target, SETTINGS[name])) > 1e-3


def test_length_by_cost_is_refused(target: LlamaForCausalLM, neighbour: LlamaForCausalLM) -> None:
    with pytest.raises(FastDraftError, match="num_assistant_tokens_schedule: cost decides token"):
        write(target, [[5, 6]], parallel(neighbour), "cost")
