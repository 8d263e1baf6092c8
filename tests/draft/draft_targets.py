"""Tiny targets of every family, and the configs of real ones."""

from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PretrainedConfig

from fastdraft_hf.draft.families import FAMILIES

VOCABULARY = 96
PUBLISHED = Path(__file__).parents[1] / "fixtures" / "targets"

# Those that the installed transformers has.
INSTALLED = sorted(name for name in FAMILIES if name in CONFIG_MAPPING)
DENSE = [name for name in INSTALLED if FAMILIES[name].dense is None]
RELATIVES = [name for name in INSTALLED if FAMILIES[name].dense]

_FIELDS: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_EXPERTS = {
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 48),
    **dict.fromkeys(("n_shared_experts", "first_k_dense_replace", "n_group", "topk_group"), 1),
    **dict.fromkeys(("num_shared_experts", "num_expert_group", "num_dense_layers"), 1),
    "num_experts_per_token": 2,
    **dict.fromkeys(("head_dim", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 8),
    # Latent attention.
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "o_lora_rank": 16,
    "o_groups": 2,
    # Linear attention and state spaces.
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "linear_head_dim"), 8),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads", "linear_num_heads"), 4),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "mamba_d_state", "ssm_state_size"), 8),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim"), 16),
    **dict.fromkeys(("mamba_n_groups", "n_groups"), 1),
    # Gemma 3n and 4.
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": VOCABULARY,
    "global_head_dim": 16,
}
# Key and value heads are as many as query heads in latent attention.
LATENT = ("deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa")
LATENT += ("hy_v4", "kimi_linear", "bailing_hybrid", "minicpm3", "sarvam_mla", "youtu")
_INDEX = {"index_n_heads": 2, "index_head_dim": 8, "index_topk": 16}
_LINEAR = {"layer_types": ["linear_attention", "full_attention", "linear_attention"]}
_CONVOLUTION = {"layer_types": ["conv", "full_attention", "conv"]}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_OWN: dict[str, dict[str, Any]] = {
    # Heads that are not width / heads, as in Qwen3 and Gemma.
    **{name: {"head_dim": 16} for name in ("ernie4_5", "gemma", "gemma2", "gemma3_text", "glm")},
    **{name: {"head_dim": 16} for name in ("cwm", "glm4", "qwen3", "seed_oss")},
    **{
        name: {"head_dim": 8}
        for name in ("ministral", "hunyuan_v1_dense", "internlm3", "iquestcoder")
    },
    "vaultgemma": {"head_dim": 16, "final_logit_softcapping": None},
    "ministral3": {
        "head_dim": 16,
        "rope_parameters": {
            **_ROPE,
            "llama_4_scaling_beta": 0.1,
            "original_max_position_embeddings": 64,
        },
    },
    "apertus": {"rope_parameters": _ROPE},
    "granite": {
        "embedding_multiplier": 3.0,
        "logits_scaling": 2.0,
        "residual_multiplier": 0.5,
        "attention_multiplier": 0.125,
    },
    "nemotron": {"partial_rotary_factor": 0.5},
    "gpt_oss": {"rope_parameters": _ROPE},
    **{name: {"num_key_value_heads": 8} for name in LATENT},
    **{
        name: {"num_key_value_heads": 8, **_INDEX}
        for name in ("deepseek_v32", "glm_moe_dsa", "hy_v4")
    },
    "deepseek_v4": _INDEX,
    **dict.fromkeys(("minimax", "qwen3_5_moe_text", "qwen3_5_text"), _LINEAR),
    **dict.fromkeys(("qwen3_next", "olmo_hybrid"), _LINEAR),
    **{name: {**_LINEAR, "num_key_value_heads": 8} for name in ("bailing_hybrid", "kimi_linear")},
    **{name: {**_CONVOLUTION, "full_attn_idxs": [1]} for name in ("lfm2", "lfm2_moe", "lfm3")},
    "bamba": {"attn_layer_indices": [1]},
    "falcon_h1": {"mamba_d_ssm": 128},
    "mimo_v2_flash": {"layer_types": ["full_attention"] * 3},
    "granitemoehybrid": {"layer_types": ["mamba", "attention", "mamba"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "gemma3n_text": {
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
        "num_kv_shared_layers": 0,
        "activation_sparsity_pattern": [0.0] * 3,
    },
    "granitemoeshared": {"shared_intermediate_size": 32},
    "ernie4_5_moe": {"moe_layer_start_index": 1, "moe_layer_end_index": 2},
}


def tiny_target(family: str, **changes: Any) -> PretrainedConfig:
    """Return the config of a tiny model of ``family``, three layers deep."""
    experts = _EXPERTS if FAMILIES.get(family) and FAMILIES[family].dense else {}
    fields = {**_FIELDS, **experts, **_OWN.get(family, {}), **changes}
    if family in ("olmoe", "flex_olmo"):  # their norms of queries expect heads as wide as the model
        fields.pop("head_dim")
    return AutoConfig.for_model(family, **fields)


def randomised(config: PretrainedConfig, seed: int, size: float = 0.2) -> Any:
    """A model none of whose parameters, norms and biases included, stands at its default."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn_like(parameter) * size)
            else:
                parameter.copy_(parameter + torch.rand_like(parameter) * 0.5)
    return model


def published(name: str) -> PretrainedConfig:
    """Return the config of a published model; the facts of its config.json."""
    return AutoConfig.from_pretrained(PUBLISHED / f"{name}.json")
