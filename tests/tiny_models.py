"""What fixtures and tests do to tiny models; pytest puts this folder on the path."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

# The ids of a reduced vocabulary: every second token, so that columns and ids differ everywhere.
KEPT = tuple(range(0, 288, 2))
# Gemma's families that go to OpenVINO.
GEMMAS = ("gemma", "gemma2", "gemma3_text")


def noisy(model: Any, amount: float = 0.1, seed: int = 0) -> Any:
    """Put a little noise on a model's weights."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(amount * parameter.std() * noise if parameter.dim() > 1 else 0)
    return model


def save_gemma(family: str, folder: Path) -> None:
    """Save a tiny random Gemma whose window of 8 is shorter than a text."""
    sizes = dict.fromkeys(("hidden_size", "intermediate_size", "vocab_size"), 64)
    sizes |= dict.fromkeys(("num_attention_heads", "num_hidden_layers"), 2)
    sizes |= {"num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 64}
    window = {} if family == "gemma" else {"sliding_window": 8}
    config = AutoConfig.for_model(family, **sizes, **window, initializer_range=0.3)
    state = torch.random.get_rng_state()
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    torch.random.set_rng_state(state)
