"""Around a call: threads, offloading, compiled and short drafts, near-ties, private hooks."""

import inspect
import itertools
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from decoding_helpers import write
from tiny_models import noisy
from transformers import GenerationMixin, LlamaForCausalLM
from transformers.generation.candidate_generator import CandidateGenerator
from transformers.generation.utils import GENERATION_MODES_MAPPING
from zoo import FAMILIES, noisy_draft, prompts, tiny

from fastdraft_hf._ties import Margin, first_difference, greedy_margin
from fastdraft_hf.decode import skinny
from fastdraft_hf.decode.patches import CACHE_NAME

TinyModel = Callable[..., LlamaForCausalLM]


def test_two_threads_share_the_models(
    target: LlamaForCausalLM, neighbour: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(skinny, "LEAST_ELEMENTS", 1)
    alone = write(target, [[40, 41, 42]])
    barrier, found = threading.Barrier(2), []

    def work() -> None:
        barrier.wait()
        for _ in range(5):
            found.append(write(target, [[40, 41, 42]], neighbour, 3))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 10
    assert all(torch.equal(text, alone) for text in found)


@pytest.mark.parametrize("which", ["target", "draft"])
def test_offloaded_weights(tiny_model: TinyModel, which: str) -> None:
    """Between passes the weights, and so ``model.device``, are on the device ``meta``."""
    from accelerate import cpu_offload

    target, draft = tiny_model(seed=0), noisy(tiny_model(seed=0))
    alone = write(target, [[40, 41, 42]])
    cpu_offload(target if which == "target" else draft, torch.device("cpu"))
    assert torch.equal(write(target, [[40, 41, 42]], draft, 3), alone)


def test_a_compiled_draft_is_unwrapped(
    target: LlamaForCausalLM, tiny_model: TinyModel, recwarn: pytest.WarningsRecorder
) -> None:
    draft = tiny_model(seed=0)
    compiled: Any = torch.compile(draft, backend="eager")
    alone = write(target, [[40, 41]])
    assert torch.equal(write(target, [[40, 41]], compiled, 3), alone)
    assert not [w for w in recwarn if "assisted_decoding" in str(w.message)]


def test_rows_past_the_drafts_positions_continue_without_it(
    target: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Learned positions end hard, and rows of a batch reach the end at different times."""
    kind, sizes = FAMILIES["gpt2"]
    monkeypatch.setitem(FAMILIES, "short gpt2", (kind, {**sizes, "n_positions": 16}))
    long, short = tiny("gpt2"), noisy_draft("short gpt2")
    for rows, length in itertools.product((1, 3), (8, 12, 14, 15, 16, 17, 20)):
        given = prompts(rows, length)
        fields = {"attention_mask": given["attention_mask"], "eos_token_id": None}
        alone = write(long, given["input_ids"], **fields)
        assert torch.equal(write(long, given["input_ids"], short, 4, **fields), alone)


def test_the_private_hooks_are_still_there(target: LlamaForCausalLM) -> None:
    """A release that moves one of `patches` must fail here, not silently."""
    assert callable(GenerationMixin._assisted_decoding)
    assert callable(GenerationMixin._get_candidate_generator)
    assert callable(CandidateGenerator.update_candidate_strategy)
    assert (
        "custom_generate"
        in inspect.signature(GenerationMixin._extract_generation_mode_kwargs).parameters
    )
    for method in GENERATION_MODES_MAPPING.values():
        assert "/" in method or callable(getattr(GenerationMixin, method))
    assert CACHE_NAME in inspect.signature(target.forward).parameters


@pytest.mark.parametrize(
    ("one", "other", "position"),
    [([], [], None), ([1, 2], [1, 2], None), ([1, 2], [1, 3], 1), ([1], [1, 2], 1), ([], [1], 0)],
)
def test_the_first_difference(one: list[int], other: list[int], position: int | None) -> None:
    assert first_difference(one, other) == first_difference(other, one) == position


def test_the_greedy_margin_is_first_minus_second(target: LlamaForCausalLM) -> None:
    ids = [40, 41, 42]
    with torch.no_grad():
        logits = target(input_ids=torch.tensor([ids])).logits[0, -1]
    first, second = logits.topk(2).values.tolist()
    margin = greedy_margin(target, ids)
    assert margin.margin == pytest.approx(first - second, abs=1e-5)
    assert margin.largest == pytest.approx(logits.abs().max().item())
    assert Margin(0.0039 * 20, 20.0).tie
    assert not Margin(0.0041 * 20, 20.0).tie
