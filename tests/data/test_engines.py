import dataclasses
import gc
import json
import os
import random
import shutil
import signal
import sys
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from fastdraft_hf._processes import drop_signal_stack
from fastdraft_hf.data.engines import (
    Completion,
    OpenVINOEngine,
    Request,
    RowSampler,
    TransformersEngine,
    VLLMEngine,
)


def make_requests(count: int, temperatures: tuple[float, ...] = (0.0,)) -> list[Request]:
    source = random.Random(0)
    return [
        Request(
            index=i,
            prompt_ids=tuple(source.randrange(3, 280) for _ in range(source.randrange(1, 9))),
            temperature=temperatures[i % len(temperatures)],
            seed=i,
            max_new_tokens=source.choice([1, 6, 12]),
            source="s",
        )
        for i in range(count)
    ]


def alone(model: Any, request: Request) -> list[int]:
    """The greedy continuation of one row, longer than any row asks for, without a stop token."""
    ids = torch.tensor([request.prompt_ids])
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=request.max_new_tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return list(output[0, ids.shape[1] :].tolist())


def test_greedy_rows_are_what_generate_writes_alone(tiny_target_folder: Path) -> None:
    requests = make_requests(20)
    model = AutoModelForCausalLM.from_pretrained(tiny_target_folder).eval()
    model.generation_config.eos_token_id = None
    free = {r.index: alone(model, r) for r in requests}
    # Stop on tokens that the model does write, so that some rows are cut and others are not.
    stop = {free[next(r.index for r in requests if r.max_new_tokens == 12)][4], 2}
    engine = TransformersEngine(tiny_target_folder, stop, batch_size=3)
    tokens: list[int] = []
    done = list(engine.generate(iter(requests), tokens.append))
    assert sorted(c.request.index for c in done) == list(range(20))
    assert sum(tokens) == sum(len(c.ids) for c in done)
    assert {c.finish_reason for c in done} == {"stop", "length"}
    for completion in done:
        expected = free[completion.request.index]
        cut = next((i + 1 for i, token in enumerate(expected) if token in stop), None)
        assert list(completion.ids) == expected[:cut]
        assert completion.finish_reason == ("length" if cut is None else "stop")


def sampled(count: int) -> list[Request]:
    return [
        dataclasses.replace(r, top_p=(1.0, 0.5)[r.index // 3 % 2])
        for r in make_requests(count, temperatures=(0.0, 0.7, 1.3))
    ]


def by_index(done: Iterable[Completion]) -> dict[int, tuple[int, ...]]:
    return {c.request.index: c.ids for c in done}


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (1.0, 0.8)])
def test_rows_are_drawn_from_the_targets_distribution(temperature: float, top_p: float) -> None:
    logits = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -3.0])
    probabilities = (logits / temperature).softmax(-1)
    if top_p < 1:  # the shortest prefix with that much mass
        probabilities = torch.where(torch.arange(6) < 3, probabilities, 0.0)
        assert 0.8 <= (logits.softmax(-1))[:3].sum() < 1
        assert logits.softmax(-1)[:2].sum() < 0.8
        probabilities = probabilities / probabilities.sum()
    rows = 20_000
    requests = [Request(i, (1,), temperature, 7000 + i, 1, "s", top_p) for i in range(rows)]
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    scores = RowSampler(requests, 1)(torch.ones(rows, 1), logits[order].repeat(rows, 1))
    assert bool((scores.isfinite().sum(-1) == 1).all())
    counts = torch.bincount(order[scores.argmax(-1)], minlength=6)
    # Six standard deviations: a seed a row, so this is the same on every machine.
    spread = 6 * (rows * probabilities * (1 - probabilities)).sqrt() + 1e-3
    assert bool(((counts - rows * probabilities).abs() <= spread).all())


def test_a_models_own_generation_config_changes_nothing(
    tiny_target_folder: Path, tmp_path: Path
) -> None:
    """A repetition penalty or top_k of the target would not be the target's own distribution."""
    folder = tmp_path / "target"
    shutil.copytree(tiny_target_folder, folder)
    (folder / "generation_config.json").write_text(
        json.dumps({"eos_token_id": 2, "repetition_penalty": 5.0, "top_k": 1, "do_sample": True})
    )
    requests = sampled(12)
    ours = TransformersEngine(folder, {0, 2}, 4).generate(requests, lambda n: None)
    plain = TransformersEngine(tiny_target_folder, {0, 2}, 4).generate(requests, lambda n: None)
    assert by_index(ours) == by_index(plain)


class Stop:
    """`on_tokens` of a caller whose time is up after a number of tokens."""

    def __init__(self, limit: int) -> None:
        self.limit, self.tokens = limit, 0

    def __call__(self, tokens: int) -> bool:
        self.tokens += tokens
        return self.tokens >= self.limit


@pytest.mark.parametrize("limit", [1, 20, 60])
def test_the_time_is_up_inside_a_batch(tiny_target_folder: Path, limit: int) -> None:
    """Rows that are finished by then are whole; the others keep their beginning."""
    requests = sampled(20)
    engine = TransformersEngine(tiny_target_folder, {0, 2}, 16)
    whole = by_index(engine.generate(requests, lambda n: None))
    stop = Stop(limit)
    done = by_index(engine.generate(requests, stop))
    assert stop.tokens < limit + 16
    assert sum(map(len, done.values())) == stop.tokens
    assert all(whole[index][: len(ids)] == ids for index, ids in done.items())
    assert done != whole


def check(done: list[Completion], requests: list[Request], stop: set[int]) -> None:
    assert sorted(c.request.index for c in done) == [r.index for r in requests]
    for completion in done:
        assert completion.request == requests[completion.request.index]
        assert 1 <= len(completion.ids) <= completion.request.max_new_tokens
        assert not stop & set(completion.ids[:-1])
        assert (completion.ids[-1] in stop) == (completion.finish_reason == "stop")
        if completion.finish_reason == "length":
            assert len(completion.ids) == completion.request.max_new_tokens


@pytest.fixture(scope="module")
def openvino_folder(openvino_models: Any) -> Path:
    return Path(openvino_models.target)


def test_openvino(tiny_target_folder: Path, openvino_folder: Path) -> None:
    requests = make_requests(17, temperatures=(0.0, 1.0))
    model = AutoModelForCausalLM.from_pretrained(tiny_target_folder).eval()
    greedy = [r for r in requests if r.temperature == 0]
    stop = {alone(model, next(r for r in greedy if r.max_new_tokens == 12))[4], 2}
    engine = OpenVINOEngine(openvino_folder, stop, 4)
    tokens: list[int] = []
    done = list(engine.generate(iter(requests), tokens.append))
    check(done, requests, stop)
    assert sum(tokens) == sum(len(c.ids) for c in done)
    assert {c.finish_reason for c in done} == {"stop", "length"}
    assert by_index(engine.generate(requests, lambda n: None)) == by_index(done)


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="POSIX signals")
def test_a_signal_after_openvino_is_handled(openvino_folder: Path) -> None:
    """OpenVINO frees the signal stack that it gave the thread: a crash, if it were still set."""
    engine = OpenVINOEngine(openvino_folder, {0, 2}, 4)
    list(engine.generate(make_requests(2), lambda n: None))
    del engine
    gc.collect()
    drop_signal_stack()
    received: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: received.append(number))
    os.kill(os.getpid(), signal.SIGUSR1)
    signal.signal(signal.SIGUSR1, before)
    assert received == [signal.SIGUSR1]


# Where two orders of a sum may not differ: on some CPUs OpenVINO computes in bfloat16 by itself.
EXACT = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}


@pytest.mark.parametrize("name", ["transformers", "openvino"])
def test_a_seed_belongs_to_its_row(
    tiny_target_folder: Path, openvino_folder: Path, name: str
) -> None:
    """So a killed run that resumes with other batches generates the same rows."""

    def engine(batch_size: int) -> Any:
        if name == "openvino":
            return OpenVINOEngine(openvino_folder, {0, 2}, batch_size, properties=EXACT)
        return TransformersEngine(tiny_target_folder, {0, 2}, batch_size)

    requests = sampled(37)
    whole = by_index(engine(16).generate(requests, lambda n: None))
    small = engine(3)
    assert by_index(small.generate(requests[11:], lambda n: None)) == {
        index: ids for index, ids in whole.items() if index >= 11
    }
    (other,) = small.generate([dataclasses.replace(requests[2], seed=99)], lambda n: None)
    assert other.ids != whole[2]


def test_openvino_heeds_top_p(openvino_folder: Path, tiny_target_folder: Path) -> None:
    """A nucleus so small that one token is left is greedy, at any temperature."""
    requests = make_requests(12, temperatures=(0.0,))
    hot = [dataclasses.replace(r, temperature=1.3, top_p=1e-6) for r in requests]
    engine = OpenVINOEngine(openvino_folder, {0, 2}, 4, properties=EXACT)
    greedy = by_index(engine.generate(requests, lambda n: None))
    assert by_index(engine.generate(hot, lambda n: None)) == greedy
    plain = TransformersEngine(tiny_target_folder, {0, 2}, 4)
    assert by_index(plain.generate(hot, lambda n: None)) == greedy


class FakeLLM:
    """vLLM's engine as `VLLMEngine` drives it: every step gives each request in flight a token."""

    def __init__(self, folder: str, **given: Any) -> None:
        assert given["generation_config"] == "vllm"
        self.llm_engine, self.running, self.aborted = self, {}, list[str]()

    def add_request(self, number: str, prompt: dict[str, list[int]], params: Any) -> None:
        self.running[number] = (prompt["prompt_token_ids"], params, [])

    def step(self) -> list[Any]:
        outputs = []
        for number, (prompt, params, found) in list(self.running.items()):
            token = 2 if len(found) == prompt[0] % 5 else 50 + params.seed
            found.append(token)
            done = token in params.stop_token_ids or len(found) == params.max_tokens
            one = SimpleNamespace(token_ids=[token])
            outputs.append(SimpleNamespace(request_id=number, outputs=[one], finished=done))
            if done:
                del self.running[number]
        return outputs

    def abort_request(self, numbers: list[str]) -> None:
        self.aborted += numbers


def test_vllm_in_this_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vllm = SimpleNamespace(LLM=FakeLLM, SamplingParams=SimpleNamespace)
    vllm.sampling_params = SimpleNamespace(RequestOutputKind=SimpleNamespace(DELTA="delta"))
    monkeypatch.setitem(sys.modules, "vllm", vllm)  # type: ignore[arg-type]
    requests = make_requests(20)
    engine = VLLMEngine(tmp_path, {2}, batch_size=3)
    tokens: list[int] = []
    done = list(engine.generate(iter(requests), tokens.append))
    assert sorted(one.request.index for one in done) == list(range(20))
    assert sum(tokens) == sum(len(one.ids) for one in done)
    for one in done:
        ends = one.request.prompt_ids[0] % 5
        expected = [50 + one.request.seed] * ends + [2]
        assert list(one.ids) == expected[: one.request.max_new_tokens]
        assert one.finish_reason == ("stop" if one.ids[-1] == 2 else "length")
    # When the time is up, what is in flight is yielded as it is, and the engine is left empty.
    cut = list(engine.generate(iter(requests), lambda _: True))
    assert [len(one.ids) for one in cut] == [1, 1, 1]
    assert engine._engine.aborted
