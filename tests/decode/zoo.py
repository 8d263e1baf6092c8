"""Tiny models of many families, with weights lively enough that greedy text varies."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

VOCABULARY = 64
_IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "tie_word_embeddings": False}
_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
_WINDOW = {"sliding_window": 8}
_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
_GPT = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}
_FEW = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
_STATES = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}

# family -> (config class, its settings)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", _SIZES),
    "qwen2": ("Qwen2Config", _SIZES),
    "qwen3": ("Qwen3Config", {**_SIZES, "head_dim": 8}),
    "gemma": ("GemmaConfig", {**_SIZES, "head_dim": 8}),
    "gemma2": ("Gemma2Config", {**_SIZES, **_WINDOW, "head_dim": 8}),
    "gemma3": (
        "Gemma3TextConfig",
        {
            **_SIZES,
            **_WINDOW,
            "head_dim": 8,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "phi": ("PhiConfig", _SIZES),
    "phi3": ("Phi3Config", {**_SIZES, "sliding_window": None}),
    "mistral": ("MistralConfig", {**_SIZES, **_WINDOW, "head_dim": 8}),
    "mistral without a window": ("MistralConfig", {**_SIZES, "sliding_window": None}),
    "gpt_neox": (
        "GPTNeoXConfig",
        {k: v for k, v in _SIZES.items() if k != "num_key_value_heads"},
    ),
    "olmo2": ("Olmo2Config", _SIZES),
    "granite": ("GraniteConfig", _SIZES),
    "smollm3": ("SmolLM3Config", _SIZES),
    "stablelm": ("StableLmConfig", _SIZES),
    "starcoder2": ("Starcoder2Config", {**_SIZES, "sliding_window": None}),
    "cohere2": ("Cohere2Config", {**_SIZES, **_WINDOW}),
    "mixtral": ("MixtralConfig", {**_SIZES, **_EXPERTS, "sliding_window": None}),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {**_SIZES, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    ),
    "gpt_oss": ("GptOssConfig", {**_SIZES, **_EXPERTS, **_WINDOW, "head_dim": 8}),
    "gpt2": ("GPT2Config", _GPT),
    "gptj": ("GPTJConfig", {**_GPT, "rotary_dim": 4}),
    "gpt_neo": (
        "GPTNeoConfig",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "intermediate_size": 48,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 8,
            "max_position_embeddings": 256,
        },
    ),
    "opt": (
        "OPTConfig",
        {**_FEW, "ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 256},
    ),
    "bloom": (
        "BloomConfig",
        {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    ),
    "falcon": ("FalconConfig", {**_FEW, "alibi": False}),
    "falcon with alibi": ("FalconConfig", {**_FEW, "alibi": True}),
    # Below: a state that cannot be rolled back, or no cache at all.
    "mamba": ("MambaConfig", _STATES),
    "mamba2": (
        "Mamba2Config",
        {**_STATES, "num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 8},
    ),
    "lfm2": ("Lfm2Config", {**_SIZES, "layer_types": ["conv", "full_attention"]}),
    "minimax": (
        "MiniMaxConfig",
        {
            **_SIZES,
            "head_dim": 8,
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "layer_types": ["linear_attention", "full_attention"],
            "block_size": 8,
        },
    ),
    "recurrent_gemma": (
        "RecurrentGemmaConfig",
        {
            **_SIZES,
            "num_hidden_layers": 3,
            "num_key_value_heads": 1,
            "intermediate_size": 96,
            "lru_width": 32,
            "attention_window_size": 16,
        },
    ),
    "openai-gpt": ("OpenAIGPTConfig", _GPT),
    "xlm": (
        "XLMConfig",
        {"vocab_size": VOCABULARY, "emb_dim": 32, "n_layers": 2, "n_heads": 4, "causal": True},
    ),
}


@functools.cache
def tiny(family: str) -> PreTrainedModel:
    """Return a model of a family; random weights of standard size would repeat one token."""
    kind, settings = FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, kind)(**{**_IDS, **settings})
    model = AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1:
                table = any(part in name for part in ("emb", "wte", "wpe"))
                size = 1.0 if table else 1.2 / weight.shape[-1] ** 0.5
                weight.copy_(size * torch.randn(weight.shape, generator=generator))
        head = model.get_output_embeddings()
        if head is not None and head.weight is not model.get_input_embeddings().weight:
            head.weight.mul_(2.5)
    model.generation_config.pad_token_id = 0
    return model


@functools.cache
def noisy_draft(family: str) -> PreTrainedModel:
    """Return a draft that agrees with `tiny` now and then: the same model with noise."""
    draft = copy.deepcopy(tiny(family))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in draft.parameters():
            if weight.dim() > 1:
                noise = torch.randn(weight.shape, generator=generator)
                weight.add_(0.15 * weight.std() * noise)
    return draft


def prompts(rows: int, length: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Return ids and mask of ``rows`` prompts, all but the first padded on the left."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, VOCABULARY, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(1, rows):
        padding = min(length - 2, 2 * row)
        ids[row, :padding], mask[row, :padding] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}
