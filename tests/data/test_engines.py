from __future__ import annotations

import importlib.util
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from fastdraft_hf._errors import FastDraftError
from fastdraft_hf.data.engines import Completion, choose_engine, open_engine
from fastdraft_hf.data.engines.transformers import TransformersEngine
from fastdraft_hf.data.requests import Request


@pytest.mark.parametrize(
    ("missing", "device", "chosen"),
    [
        (set(), "cpu", "openvino"),
        (set(), "cuda", "transformers"),
        ({"openvino_genai"}, "cpu", "transformers"),
        ({"optimum", "optimum.intel"}, "cpu", "transformers"),
        # Other parts of optimum come alone with other packages.
        ({"optimum.intel"}, "cpu", "transformers"),
    ],
)
def test_auto(monkeypatch: pytest.MonkeyPatch, missing: set[str], device: str, chosen: str) -> None:
    real = importlib.util.find_spec
    modules = {"openvino", "openvino_genai", "openvino_tokenizers", "optimum", "optimum.intel"}

    def find(name: str, package: str | None = None) -> Any:
        if name in modules:
            return None if name in missing else object()
        return real(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", find)
    assert choose_engine("auto", device) == chosen
    assert choose_engine("transformers", device) == "transformers"
    if missing:
        with pytest.raises(FastDraftError, match="openvino is not installed; `pip install"):
            choose_engine("openvino", device)
    else:
        assert choose_engine("openvino", device) == "openvino"


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


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_every_request_once_at_every_temperature(tiny_target_folder: Path, batch_size: int) -> None:
    requests = make_requests(37, temperatures=(0.0, 0.7, 1.0))
    engine = TransformersEngine(tiny_target_folder, {0, 2}, batch_size=batch_size)
    done = list(engine.generate(requests, lambda n: None))
    check(done, requests, {0, 2})
    again = list(engine.generate(requests, lambda n: None))
    assert again == done


def check(done: list[Completion], requests: list[Request], stop: set[int]) -> None:
    assert sorted(c.request.index for c in done) == [r.index for r in requests]
    for completion in done:
        assert completion.request == requests[completion.request.index]
        assert 1 <= len(completion.ids) <= completion.request.max_new_tokens
        assert not stop & set(completion.ids[:-1])
        assert (completion.ids[-1] in stop) == (completion.finish_reason == "stop")
        if completion.finish_reason == "length":
            assert len(completion.ids) == completion.request.max_new_tokens


def test_openvino_needs_its_folder(tiny_target_folder: Path) -> None:
    with pytest.raises(ValueError, match="needs openvino_target"):
        open_engine(
            "openvino",
            target=tiny_target_folder,
            openvino_target=None,
            stop_ids={2},
            batch_size=4,
            device="cpu",
        )


@pytest.fixture(scope="module")
def openvino_folder(tiny_target_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("openvino_genai")
    pytest.importorskip("optimum.intel")
    from fastdraft_hf.export.openvino import export_openvino

    folder = tmp_path_factory.mktemp("openvino") / "target"
    export_openvino(tiny_target_folder, folder, "fp32")
    return folder


def test_openvino(tiny_target_folder: Path, openvino_folder: Path) -> None:
    requests = make_requests(17, temperatures=(0.0, 1.0))
    model = AutoModelForCausalLM.from_pretrained(tiny_target_folder).eval()
    greedy = [r for r in requests if r.temperature == 0]
    stop = {alone(model, next(r for r in greedy if r.max_new_tokens == 12))[4], 2}
    engine = open_engine(
        "openvino",
        target=tiny_target_folder,
        openvino_target=openvino_folder,
        stop_ids=stop,
        batch_size=4,
        device="cpu",
    )
    tokens: list[int] = []
    done = list(engine.generate(iter(requests), tokens.append))
    check(done, requests, stop)
    assert sum(tokens) == sum(len(c.ids) for c in done)
    assert {c.finish_reason for c in done} == {"stop", "length"}
    again = sorted(engine.generate(requests, lambda n: None), key=lambda c: c.request.index)
    assert [c.ids for c in again if c.request.temperature == 0] == [
        c.ids for c in sorted(done, key=lambda c: c.request.index) if c.request.temperature == 0
    ]
