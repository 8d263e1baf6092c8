"""Logits of the last places only: the same numbers, for who asks; every place for all others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from fastdraft_hf.decode.openvino import narrow as openvino_narrow
from fastdraft_hf.decode.openvino.narrow import EVERY_POSITION, STATE, narrow
from fastdraft_hf.decode.openvino.stateful import OpenVINOModel

openvino = pytest.importorskip("openvino")
pytest.importorskip("optimum.intel")

PROMPT = torch.randint(3, 288, (2, 40), generator=torch.Generator().manual_seed(0))
EXACT = {"KV_CACHE_PRECISION": "f32", "INFERENCE_PRECISION_HINT": "f32"}


@pytest.fixture(scope="module")
def folder(openvino_models: Any) -> Path:
    return Path(openvino_models.target)


def load(folder: Path) -> Any:
    from optimum.intel import OVModelForCausalLM

    return OVModelForCausalLM.from_pretrained(folder, ov_config=EXACT)


def states(model: Any) -> set[str]:
    return {state.name for state in model.request.query_state()}


def test_the_last_positions_are_those_of_the_whole(folder: Path) -> None:
    whole = load(folder)(input_ids=PROMPT, attention_mask=torch.ones_like(PROMPT)).logits
    model = load(folder)
    cached = OpenVINOModel(model)
    assert STATE in states(model)
    positions = torch.arange(40).expand(2, -1)
    last = cached.feed(PROMPT, positions, None, keep=3)
    assert model.request.get_tensor("logits").shape == [2, 3, whole.shape[-1]]
    assert torch.allclose(last, whole[:, -3:], atol=1e-5)
    # A step of a few tokens scores them all again, with the same cache.
    more = cached.feed(PROMPT[:, :2], torch.tensor([[40, 41]] * 2), None, keep=1)
    assert model.request.get_tensor("logits").shape[1] == 2
    assert more.shape[1] == 1


def test_who_does_not_ask_gets_every_place(folder: Path) -> None:
    model = load(folder)
    before = model(input_ids=PROMPT, attention_mask=torch.ones_like(PROMPT)).logits
    place = narrow(model)
    place.state = openvino.Tensor(numpy.array([-1], dtype=numpy.int32))
    # A new sequence resets the states, ours with them.
    after = model(input_ids=PROMPT, attention_mask=torch.ones_like(PROMPT)).logits
    assert place.state.data.tolist() == [EVERY_POSITION]
    assert torch.allclose(before, after, atol=1e-5)
    request = model.request
    narrow(model)
    assert model.request is request  # compiled once


def test_what_is_saved_stays_as_it_was(folder: Path, tmp_path: Path) -> None:
    model = load(folder)
    narrow(model)
    model.save_pretrained(tmp_path)
    assert STATE in states(model)
    assert STATE not in states(load(tmp_path))


def test_a_head_that_is_a_small_part_is_left_alone(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openvino_narrow, "LEAST_SHARE", 0.99)
    model = load(folder)
    request = model.request
    assert narrow(model) is None
    assert model.request is request
    cached = OpenVINOModel(model)
    cached.feed(PROMPT, torch.arange(40).expand(2, -1), None, keep=1)
    assert model.request.get_tensor("logits").shape[1] == 40
