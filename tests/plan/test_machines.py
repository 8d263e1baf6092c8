"""Devices, sizes of models, and rooflines."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from fastdraft_hf import FastDraftError
from fastdraft_hf.plan.machines import DEVICES, Shape, parse_hardware, shape_of

SHAPE = Shape(
    parameters=7_000_000_000,
    read=7_000_000_000,
    layers=32,
    width=4096,
    inner=14336,
    key=1024,
    vocabulary=128_000,
)
H100 = DEVICES["H100"]


@pytest.mark.parametrize(
    ("text", "count", "name"),
    [("8xH100", 8, "H100"), ("gaudi2", 1, "Gaudi2"), ("2×rtx4090", 2, "RTX4090")],
)
def test_hardware(text: str, count: int, name: str) -> None:
    found = parse_hardware(text)
    assert (found.count, found.name) == (count, name)
    assert parse_hardware("CPU").cpu


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("8xH10", "did you mean 'h100'"),
        ("lots", "a number and one of"),
    ],
)
def test_other_hardware_is_refused(text: str, said: str) -> None:
    with pytest.raises(FastDraftError, match=said):
        parse_hardware(text)


@pytest.mark.parametrize("tied", [True, False])
def test_shapes_are_counted_from_the_model(tied: bool) -> None:
    config = LlamaConfig(
        vocab_size=200,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        attn_implementation="eager",
    )
    shape, model = shape_of(config), AutoModelForCausalLM.from_config(config).eval()
    assert shape.parameters == model.num_parameters()
    layers = sum(p.numel() for p in model.model.layers.parameters())
    assert shape.read == layers + 32 + 6400  # the last norm, and the head
    assert (shape.key, shape.cache_bytes(2)) == (16, 2 * 2 * 16 * 2)
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 48, dtype=torch.long))
    # Eager attention computes all scores, also those that the mask hides.
    assert counter.get_total_flops() == pytest.approx(48 * shape.flops(48), rel=0.03)


def test_one_text_is_bound_by_memory_and_many_by_flops() -> None:
    machine = replace(H100, launch=0)
    one = machine.round_seconds(SHAPE, SHAPE, "alone", 0)
    assert one == pytest.approx(2 * 7e9 / (3.35e12 * 0.6), rel=0.01)
    many = machine.step(SHAPE, 4096, 2)
    assert many == pytest.approx(4096 * SHAPE.flops(2) / (989e12 * 0.4))
    assert H100.step(SHAPE, 64, 200) > H100.step(SHAPE, 64, 200, "vllm")
