"""The target's stored distribution: what is written is what a plain forward pass gives."""

import copy
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Gemma2Config, Gemma2ForCausalLM, GraniteConfig, GraniteForCausalLM

from fastdraft_hf import FastDraftError
from fastdraft_hf.data import columns
from fastdraft_hf.data import target_logits as module
from fastdraft_hf.data.engines import Completion, Request, TransformersEngine
from fastdraft_hf.data.parts import iter_rows, stored_indices, write_rows
from fastdraft_hf.data.target_logits import FLOOR, write_target_logits

from .fakes import in_processes

Make = Callable[..., Any]
V = 288
LENGTHS = st.lists(st.tuples(st.integers(0, 5), st.integers(1, 6)), max_size=9)


@pytest.fixture(scope="module")
def target(tiny_model: Make) -> Any:
    return tiny_model(seed=2)


class Writer:
    name = "writer"

    def __init__(self, seed: int, low: int = 3, high: int = V) -> None:
        self.generator, self.range = torch.Generator().manual_seed(seed), (low, high)

    def ids(self, count: int) -> tuple[int, ...]:
        return tuple(torch.randint(*self.range, (count,), generator=self.generator).tolist())

    def generate(self, requests: Any, on_tokens: Any) -> Any:
        for request in requests:
            yield Completion(request, self.ids(request.max_new_tokens), "length")


def write_set(folder: Path, lengths: list[tuple[int, int]], seed: int = 0, **ids: int) -> None:
    """Write rows of (prompt, completion) lengths."""
    writer = Writer(seed, **ids)
    requests = [
        Request(number, writer.ids(prompt), 0.0, number, length, "s")
        for number, (prompt, length) in enumerate(lengths)
    ]
    write_rows(writer, requests, folder)


def check_rows(folder: Path, generated: Path, model: Any, k: int, temperature: float) -> None:
    """Hold every stored number against the target reading the row alone, in float64."""
    rows = list(iter_rows(folder))
    kept = {row["index"]: row for row in iter_rows(generated)}
    kept = {index: kept[index] for index in stored_indices(folder).tolist()}
    assert [row["index"] for row in rows] == list(kept)
    for row in rows:
        source = kept[row["index"]]
        prompt, completion = source["prompt_ids"], source["completion_ids"]
        assert row["input_ids"] == prompt + completion
        assert row["labels"] == [-100] * len(prompt) + completion
        assert row[columns.TEMPERATURE] == temperature
        positions, ids, log_probs = columns.stored(row)
        first = max(1, len(prompt))
        assert positions.tolist() == list(range(first, len(row["input_ids"])))
        assert all(len(row[name]) == len(row["input_ids"]) for name in columns.LISTS)
        if not len(positions):
            continue
        with torch.no_grad():
            logits = model(torch.tensor([row["input_ids"]])).logits[0, first - 1 : -1].double()
        exact = torch.log_softmax(logits / temperature, -1)
        chosen = torch.from_numpy(ids)
        assert ids.shape == (len(exact), k)
        assert all(len(set(entry)) == k for entry in chosen.tolist())
        # float16 has eleven bits; float32's order of summation is below that.
        close = {"rtol": 2**-10, "atol": 1e-4}
        stored = torch.from_numpy(log_probs.astype(np.float64))
        torch.testing.assert_close(stored, exact.gather(1, chosen), **close)
        torch.testing.assert_close(stored, exact.topk(k, -1).values, **close)
        tail = exact.scatter(1, chosen, float("-inf")).logsumexp(-1).clamp(min=FLOOR)
        found = torch.tensor(row[columns.TAIL], dtype=torch.float64)
        torch.testing.assert_close(found[first:], tail, **close)
        assert not found[:first].any()


@settings(max_examples=25)
@given(
    lengths=LENGTHS,
    top_k=st.sampled_from([1, 2, 7, V - 1, V]),
    temperature=st.sampled_from([0.5, 1.0, 2.0]),
    batch_tokens=st.sampled_from([1, 9, 25, 4096]),
    rows_per_part=st.integers(1, 5),
    window=st.integers(1, 5),
    head_tokens=st.sampled_from([1, 3, 512]),
    world=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_what_is_stored_is_a_forward_pass_of_the_row_alone(
    target: Any,
    lengths: list[tuple[int, int]],
    top_k: int,
    temperature: float,
    batch_tokens: int,
    rows_per_part: int,
    window: int,
    head_tokens: int,
    world: int,
    seed: int,
) -> None:
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_HEAD_TOKENS", head_tokens)
        patch.setattr(module, "_WINDOW", window)
        patch.setattr(module, "BATCH_TOKENS", batch_tokens)
        generated, folder = Path(name) / "rows", Path(name) / "logits"
        write_set(generated, lengths, seed)

        def work(rank: int) -> None:
            write_target_logits(target, generated, folder, top_k=top_k, temperature=temperature)

        in_processes(world, work, rows_per_part)
        check_rows(folder, generated, target, top_k, temperature)
        assert stored_indices(folder).tolist() == module.kept_indices(generated)[0].tolist()


TINY = {
    "vocab_size": V,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
}


@pytest.mark.parametrize("kind", ["gemma2", "granite"])
def test_heads_that_scale_or_cap_their_logits(tmp_path: Path, kind: str) -> None:
    torch.manual_seed(0)
    if kind == "gemma2":
        model: Any = Gemma2ForCausalLM(Gemma2Config(**TINY, final_logit_softcapping=0.5))
    else:
        model = GraniteForCausalLM(GraniteConfig(**TINY, logits_scaling=0.05))
    model.eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)
    write_set(tmp_path / "rows", [(2, 3), (1, 4), (3, 1)])
    write_target_logits(model, tmp_path / "rows", tmp_path / "logits", top_k=6, temperature=1.0)
    check_rows(tmp_path / "logits", tmp_path / "rows", model, 6, 1.0)


def test_more_tokens_than_the_vocabulary_has(target: Any, tmp_path: Path) -> None:
    write_set(tmp_path / "rows", [(1, 1)])
    with pytest.raises(FastDraftError, match="top_k: 289 is more than the target's vocabulary of"):
        write_target_logits(target, tmp_path / "rows", tmp_path / "x", top_k=289, temperature=1.0)
    assert not (tmp_path / "x").exists()


def test_logits_that_are_not_finite(target: Any, tmp_path: Path) -> None:
    write_set(tmp_path / "rows", [(1, 1)])
    broken = copy.deepcopy(target)
    broken.model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(FastDraftError, match=r"^logits: the target's logits are not finite"):
        write_target_logits(broken, tmp_path / "rows", tmp_path / "x", top_k=2, temperature=1.0)
    broken.save_pretrained(tmp_path / "broken")
    request = Request(0, (5, 6), 0.0, 0, 3, "s")
    engine = TransformersEngine(tmp_path / "broken", {0})
    with pytest.raises(FastDraftError, match=r"^generate: the target's logits are not finite"):
        list(engine.generate([request], lambda new: None))
