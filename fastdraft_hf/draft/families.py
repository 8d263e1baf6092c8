"""The decoder families a draft can be designed for.

A draft has its target's family (transformers' `model_type`). The family's config class says most of
what a draft needs; the rest is here:

- ``own_head_size=False``: the model computes the size of a head as width / heads and ignores
  ``head_dim``;
- ``pre_norms``: the two norms of a layer before attention and feed-forward, where every norm on the
  residual stream is an RMSNorm before a block. Such a model computes the same when its hidden
  states are rotated, so `prune` may cut its width along principal directions. Other families are
  cut along channels;
- ``dense``: where layers cannot be cut (mixtures of experts, linear or latent attention), the
  family of the drafts;
- ``scaled_embeddings=True``: embeddings are multiplied by the square root of the width.

To add a family, add its name. `tests/draft/test_families.py` then tests it (parameter counts, save
and load, every initialization, assisted generation).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastdraft_hf._errors import FastDraftError
from fastdraft_hf.target.resolve import meta_model

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class Family:
    """How a family's config is scaled. The module's docstring explains the fields."""

    own_head_size: bool = True
    pre_norms: tuple[str, str] | None = None
    dense: str | None = None
    scaled_embeddings: bool = False


_LLAMA = Family(pre_norms=("input_layernorm", "post_attention_layernorm"))

FAMILIES: dict[str, Family] = {
    **dict.fromkeys(("arcee", "cwm", "ernie4_5", "exaone", "glm", "granite"), _LLAMA),
    **dict.fromkeys(("hunyuan_v1_dense", "internlm3", "iquestcoder", "llama", "ministral"), _LLAMA),
    **dict.fromkeys(("ministral3", "mistral", "phi3", "qwen2", "qwen3"), _LLAMA),
    **dict.fromkeys(("seed_oss", "smollm3"), _LLAMA),
    "apertus": Family(pre_norms=("attention_layernorm", "feedforward_layernorm")),
    "gemma": Family(pre_norms=_LLAMA.pre_norms, scaled_embeddings=True),
    "vaultgemma": Family(
        pre_norms=("input_layernorm", "pre_feedforward_layernorm"), scaled_embeddings=True
    ),
    **dict.fromkeys(("gemma2", "gemma3_text"), Family(scaled_embeddings=True)),
    **dict.fromkeys(("cohere", "cohere2", "exaone4", "glm4", "jais2", "nemotron"), Family()),
    **dict.fromkeys(("olmo", "olmo2", "olmo3", "phi", "starcoder2"), Family()),
    **dict.fromkeys(("gpt_neox", "stablelm"), Family(own_head_size=False)),
}
# Layers that cannot be cut: a dense relative that shares what it can (head size, rope, heads).
_RELATIVES = {
    "cohere2": "cohere2_moe",
    "ernie4_5": "ernie4_5_moe",
    "exaone4": "exaone_moe",
    "gemma3_text": "gemma3n_text gemma4_text gemma4_unified_text",
    "glm4": "glm4_moe glm4_moe_lite glm_moe_dsa",
    "granite": "granite_swa granitemoe granitemoe_swa granitemoehybrid granitemoeshared",
    "hunyuan_v1_dense": "hunyuan_v1_moe hy_v3 hy_v4",
    "llama": "afmoe apertus1p5_text bailing_hybrid bamba bitnet deepseek_v2 deepseek_v3 "
    "deepseek_v32 deepseek_v4 falcon_h1 gpt_oss helium hyperclovax jamba kimi_linear laguna lfm2 "
    "lfm2_moe lfm3 llama4_text mellum mimo_v2_flash minicpm3 minimax minimax_m2 "
    "minimax_m3_vl_text nemotron_h sarvam_mla sarvam_moe solar_open youtu",
    "mistral": "mixtral",
    "olmo2": "flex_olmo olmo_hybrid olmoe",
    "phi3": "phimoe",
    "qwen2": "qwen2_moe",
    "qwen3": "dots1 qwen3_5_moe_text qwen3_5_text qwen3_moe qwen3_next",
}
FAMILIES |= {
    name: Family(dense=dense) for dense, names in _RELATIVES.items() for name in names.split()
}

# The config of a mixture of experts gives the width of one expert, or of a dense layer it may not
# have. Where that is no dense model's proportion, the usual one of gated feed-forwards is used.
DENSE_PROPORTION = 3.0


def family_of(config: PretrainedConfig) -> Family:
    """Return the family of a text config, or raise `FastDraftError` with those supported."""
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise FastDraftError(
            f"target: family '{config.model_type}' has no draft design yet; supported: "
            + ", ".join(sorted(FAMILIES))
        )
    return family


def text_config(config: PretrainedConfig) -> PretrainedConfig:
    """Return the decoder's config: a multimodal model's text part, else ``config`` itself."""
    return config if config.model_type in FAMILIES else config.get_text_config(decoder=True)


def dense_config(config: PretrainedConfig) -> PretrainedConfig:
    """Return a text config of a dense family: ``config`` itself, or its dense relative's.

    The relative gets every field that its own config class has.
    """
    from transformers import CONFIG_MAPPING

    relative = family_of(config).dense
    if relative is None:
        return config
    cls = CONFIG_MAPPING[relative]
    own, given = cls().to_dict(), config.to_dict()
    # Gemma 4 means the tokens of an image by the last one, Gemma 3 all tokens.
    left = {"model_type", "architectures", "transformers_version", "use_bidirectional_attention"}
    kept: dict[str, Any] = {key: given[key] for key in own if key in given and key not in left}
    if not set(kept.get("layer_types") or ()) <= {"full_attention", "sliding_attention"}:
        del kept["layer_types"]
    kept["rope_parameters"] = _rope(kept.get("rope_parameters") or {}, own["rope_parameters"])
    kept["head_dim"] = given.get("head_dim") or head_size(config)
    inner = kept.get("intermediate_size")
    if not isinstance(inner, int) or inner < 2 * config.hidden_size:
        kept["intermediate_size"] = round(DENSE_PROPORTION * config.hidden_size)
    return cls(**kept)


def _rope(given: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """Return a config's rope for a family whose default is ``own``."""
    if "full_attention" in own:
        return own
    one = given.get("full_attention") or given.get("main") or given
    if one is not given or "rope_theta" not in one:  # a rope for every kind of layer, or none
        return {**own, "rope_theta": (one or own).get("rope_theta", own["rope_theta"])}
    return {key: one[key] for key in one if key != "partial_rotary_factor" or key in own}


def count_parameters(config: PretrainedConfig) -> int:
    """Return the exact number of parameters of ``config``'s model, without allocating it.

    Tied weights count once.
    """
    return sum(parameter.numel() for parameter in meta_model(config).parameters())


def read_parameters(config: PretrainedConfig, scored: int | None = None) -> int:
    """Return how many parameters one token reads: all but an input embedding that is no head.

    Of an embedding that is only looked up, one row is read, and of a head those of the ``scored``
    tokens (by default all). At equal precision this decides the time of a small model's pass, which
    waits for memory.
    """
    model = meta_model(config)
    looked_up, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    size: int = sum(parameter.numel() for parameter in model.parameters())
    if scored is not None:
        size -= (len(head) - scored) * head.shape[1]
    return size - (0 if head is looked_up else looked_up.numel())


def head_size(config: PretrainedConfig) -> int:
    """Return the size of one attention head."""
    given = getattr(config, "head_dim", None)
    return int(given or config.hidden_size // config.num_attention_heads)


def head_groups(config: PretrainedConfig) -> int:
    """Return the number of key-value heads."""
    return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
