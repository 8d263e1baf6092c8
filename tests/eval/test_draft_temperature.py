from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import LlamaForCausalLM

from fastdraft_hf.decode.records import listener
from fastdraft_hf.decode.settings import TEMPERATURE_RATIO
from fastdraft_hf.decode.speculative import assisted_decoding
from fastdraft_hf.eval.draft_temperature import RATIOS, fit_temperature_ratio
from fastdraft_hf.eval.expected import Continuation, text_acceptance

SCALE = 5
TEXTS = [Continuation("t", (1, 2, 3), tuple(range(4, 30))), Continuation("t", (5,), (6, 7, 8))]


def test_the_best_ratio_undoes_a_flatter_draft(tiny_model: Callable[..., LlamaForCausalLM]) -> None:
    """A draft whose logits are 0.7 times the target's is the target at ratio 0.7."""
    target, draft = tiny_model(seed=0), tiny_model(seed=0)
    with torch.no_grad():
        target.model.norm.weight.mul_(SCALE)
        draft.model.norm.weight.mul_(SCALE * 0.7)
    found = fit_temperature_ratio(target, draft, TEXTS, 0.8)
    assert found["temperature_ratio"] == 0.7
    assert found["acceptance"] == pytest.approx(1, abs=1e-5)
    assert found["tokens"] == 29
    for name, ratio in (("acceptance", 0.7), ("acceptance_at_1", 1.0)):
        read = [text_acceptance(target, draft, text, 0.8, (), ratio) for text in TEXTS]
        alphas = [alpha for one in read for alpha in one.alphas]
        assert found[name] == pytest.approx(sum(alphas) / 29, abs=1e-5)


def test_no_text_leaves_the_temperature_alone(tiny_model: Callable[..., LlamaForCausalLM]) -> None:
    assert fit_temperature_ratio(tiny_model(), tiny_model(seed=1), [], 0.6)[
        "temperature_ratio"
    ] == pytest.approx(1.0)
    assert 1.0 in RATIOS


def test_the_loop_drafts_at_the_ratio(tiny_model: Callable[..., LlamaForCausalLM]) -> None:
    """Where the ratio makes both distributions equal, every drafted token is accepted."""
    target, draft = tiny_model(seed=0), tiny_model(seed=0)
    with torch.no_grad():
        target.model.norm.weight.mul_(SCALE)
        draft.model.norm.weight.mul_(SCALE * 0.7)
    draft.generation_config.num_assistant_tokens = 4
    shares = []
    for ratio in (0.7, 1.0):
        torch.manual_seed(0)
        setattr(draft.generation_config, TEMPERATURE_RATIO, ratio)
        rounds: list[tuple[int, int, int]] = []
        token = listener.set(lambda *one, rounds=rounds: rounds.append(one))
        target.generate(
            torch.tensor([[1, 2, 3]]),
            do_sample=True,
            max_new_tokens=60,
            assistant_model=draft,
            custom_generate=assisted_decoding,
        )
        listener.reset(token)
        shares.append(sum(one[2] for one in rounds) / sum(one[1] for one in rounds))
    assert shares[0] > 0.999
    assert shares[1] < 0.95
