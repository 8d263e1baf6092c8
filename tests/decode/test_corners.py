"""What real programs do around a call: threads, offloading, compiled drafts, short drafts."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from decoding_helpers import write
from tiny_models import noisy
from transformers import LlamaForCausalLM
from zoo import FAMILIES, noisy_draft, prompts, tiny

from fastdraft_hf.decode import skinny

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
