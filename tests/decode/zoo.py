"""Tiny models of many families, with weights lively enough that greedy text varies."""

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


def _family(kind: str, *sizes: dict[str, Any], **more: Any) -> tuple[str, dict[str, Any]]:
    return kind, {key: value for part in (*sizes, more) for key, value in part.items()}


# family -> (config class, its settings)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": _family("LlamaConfig", _SIZES),
    "qwen2": _family("Qwen2Config", _SIZES),
    "qwen3": _family("Qwen3Config", _SIZES, head_dim=8),
    "gemma": _family("GemmaConfig", _SIZES, head_dim=8),
    "gemma2": _family("Gemma2Config", _SIZES, _WINDOW, head_dim=8),
    "gemma3": _family(
        "Gemma3TextConfig", _SIZES, _WINDOW, head_dim=8,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "phi": _family("PhiConfig", _SIZES),
    "phi3": _family("Phi3Config", _SIZES, sliding_window=None),
    "mistral": _family("MistralConfig", _SIZES, _WINDOW, head_dim=8),
    "mistral without a window": _family("MistralConfig", _SIZES, sliding_window=None),
    "gpt_neox": _family("GPTNeoXConfig", _FEW, intermediate_size=48, max_position_embeddings=256),
    "olmo2": _family("Olmo2Config", _SIZES),
    "granite": _family("GraniteConfig", _SIZES),
    "smollm3": _family("SmolLM3Config", _SIZES),
    "stablelm": _family("StableLmConfig", _SIZES),
    "starcoder2": _family("Starcoder2Config", _SIZES, sliding_window=None),
    "cohere2": _family("Cohere2Config", _SIZES, _WINDOW),
    "mixtral": _family("MixtralConfig", _SIZES, _EXPERTS, sliding_window=None),
    "qwen3_moe": _family(
        "Qwen3MoeConfig", _SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16
    ),
    "gpt_oss": _family("GptOssConfig", _SIZES, _EXPERTS, _WINDOW, head_dim=8),
    "gpt2": _family("GPT2Config", _GPT),
    "gptj": _family("GPTJConfig", _GPT, rotary_dim=4),
    "gpt_neo": _family(
        "GPTNeoConfig", vocab_size=VOCABULARY, hidden_size=32, num_layers=2, num_heads=4,
        intermediate_size=48, attention_types=[[["global", "local"], 1]], window_size=8,
        max_position_embeddings=256,
    ),
    "opt": _family(
        "OPTConfig", _FEW, ffn_dim=48, word_embed_proj_dim=32, max_position_embeddings=256
    ),
    "bloom": _family("BloomConfig", vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4),
    "falcon": _family("FalconConfig", _FEW, alibi=False),
    "falcon with alibi": _family("FalconConfig", _FEW, alibi=True),
    # Below: a state that cannot be rolled back, or no cache at all.
    "mamba": _family("MambaConfig", _STATES),
    "mamba2": _family("Mamba2Config", _STATES, num_heads=8, head_dim=8, n_groups=1, chunk_size=8),
    "lfm2": _family("Lfm2Config", _SIZES, layer_types=["conv", "full_attention"]),
    "minimax": _family(
        "MiniMaxConfig", _SIZES, head_dim=8, num_local_experts=2, num_experts_per_tok=1,
        layer_types=["linear_attention", "full_attention"], block_size=8,
    ),
    "recurrent_gemma": _family(
        "RecurrentGemmaConfig",
        {**_SIZES, "num_hidden_layers": 3, "num_key_value_heads": 1, "intermediate_size": 96},
        lru_width=32, attention_window_size=16,
    ),
    "openai-gpt": _family("OpenAIGPTConfig", _GPT),
    "xlm": _family(
        "XLMConfig", vocab_size=VOCABULARY, emb_dim=32, n_layers=2, n_heads=4, causal=True
    ),
}  # fmt: skip


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
