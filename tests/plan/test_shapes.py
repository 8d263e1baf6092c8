"""Parameters and FLOPs, against models that are really built."""

from __future__ import annotations

import pytest
import torch
from planning import PHI3, PHI3_TARGET, job_of
from transformers import AutoModelForCausalLM, LlamaConfig

from fastdraft_hf.plan.shapes import shape_of
from fastdraft_hf.recipe import read_recipe


def test_the_flops_of_a_token_are_six_n_and_attention() -> None:
    recipe = read_recipe(PHI3, ["device=cuda"])
    draft = job_of(recipe, PHI3_TARGET, None).draft
    embeddings = draft.parameters - draft.layer_parameters - draft.head_parameters - draft.width
    assert embeddings == 32064 * draft.width
    expected = 6 * (draft.layer_parameters + draft.head_parameters)
    expected += 12 * draft.layers * draft.query * 1024  # half of a context of 2048
    assert draft.train_flops(2048) == expected


def test_shapes_are_counted_from_the_real_model() -> None:
    config = LlamaConfig(
        vocab_size=100,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    shape, model = shape_of(config), AutoModelForCausalLM.from_config(config)
    assert shape.parameters == model.num_parameters()
    assert shape.layer_parameters == sum(p.numel() for p in model.model.layers.parameters())
    assert shape.head_parameters == 1600
    assert (shape.query, shape.key) == (16, 8)
    assert shape.cache_bytes() == 2 * 3 * 8 * 2


def test_forward_flops_agree_with_what_pytorch_counts() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    config = LlamaConfig(
        vocab_size=200,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_implementation="eager",
    )
    model, length = AutoModelForCausalLM.from_config(config).eval(), 48
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, length, dtype=torch.long))
    # Eager attention makes all scores, also those that the mask hides.
    expected = length * shape_of(config).forward_flops(length)
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.03)
