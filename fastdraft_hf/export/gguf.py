"""Export Hugging Face checkpoints to GGUF files for llama.cpp, through its `gguf` package.

The package has the writer, the table of tensor names and the quantizers, but not llama.cpp's
conversion script. This module maps decoder families whose tensors correspond one to one, and
byte-level BPE tokenizers. It refuses everything else and names the script, because a file that
loads and is wrong is worse than none.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fastdraft_hf._atomic import atomic_file
from fastdraft_hf._errors import FastDraftError
from fastdraft_hf.draft.families import head_size
from fastdraft_hf.target.resolve import load_tokenizer, stored_eos

if TYPE_CHECKING:
    import numpy as np
    import torch
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

GGUFType = Literal["f32", "f16", "bf16", "q8_0"]

logger = logging.getLogger(__name__)

SCRIPT = "use llama.cpp's own convert_hf_to_gguf.py"

# `model_type` of transformers -> architecture of GGUF.
_ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "phi3": "phi3",
}

# llama.cpp requires heads x head size == width of these architectures.
_SQUARE_ATTENTION = ("qwen2", "phi3")

# Pre-tokenizers that llama.cpp knows by name, with the patterns of the models' tokenizer.json.
_LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_PATTERNS = {
    _LETTERS + r"\p{N}{1,3}" + _REST: "llama-bpe",
    _LETTERS + r"\p{N}" + _REST: "qwen2",
}


def export_gguf(model: Path, output: Path, weight_type: GGUFType = "f16") -> None:
    """Write ``model`` as a GGUF file to ``output``, which appears when it is complete.

    Args:
        model: a folder with config, tokenizer and safetensors weights.
        output: the file to make; an older one is replaced.
        weight_type: how matrices are stored; vectors are always float32. With q8_0, matrices whose
            rows are not a multiple of 32 long are stored in float16.

    Raises:
        FastDraftError: the family or the tokenizer is not mapped.
    """
    import gguf
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(model, trust_remote_code=False)
    tokenizer = load_tokenizer(model)
    architecture = check_supported(config)
    pre = pre_tokenizer_name(tokenizer)
    weights = AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.float32, use_safetensors=True, trust_remote_code=False
    )
    with atomic_file(output) as temporary:
        writer = gguf.GGUFWriter(temporary, architecture)
        _add_settings(writer, config, architecture, model.resolve().name, weight_type)
        _add_tokenizer(writer, tokenizer, pre, config.vocab_size, model)
        halves = 0
        for name, tensor in _tensors(weights, architecture):
            array, kind = _stored(tensor, weight_type)
            writer.add_tensor(name, array, raw_dtype=kind)
            halves += kind.name == "F16"
        if halves and weight_type == "q8_0":
            rows = "their rows are not a multiple of 32 long"
            logger.warning("gguf: %d matrices are stored in f16, not q8_0: %s", halves, rows)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def check_supported(config: PretrainedConfig) -> str:
    """Return the GGUF architecture of a config.

    Raises:
        FastDraftError: its family, or one of its settings, is not mapped.
    """
    family = config.model_type
    if family not in _ARCHITECTURES:
        raise FastDraftError(
            f"gguf: family '{family}' is not mapped; {SCRIPT}. Mapped: {', '.join(_ARCHITECTURES)}"
        )
    kind = config.rope_parameters["rope_type"]
    if kind not in ("default", "llama3"):
        raise FastDraftError(f"gguf: rope scaling '{kind}' is not mapped; {SCRIPT}")
    if family in _SQUARE_ATTENTION and head_size(config) * config.num_attention_heads != (
        config.hidden_size
    ):
        raise FastDraftError(
            f"gguf: llama.cpp reads '{family}' only where heads x head size is the width; here "
            f"{config.num_attention_heads} x {head_size(config)} is not {config.hidden_size}"
        )
    for name in ("mlp_bias", "attention_bias"):
        if getattr(config, name, False):
            raise FastDraftError(f"gguf: {name} is not mapped; {SCRIPT}")
    return _ARCHITECTURES[family]


def pre_tokenizer_name(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return llama.cpp's name of a byte-level BPE's pre-tokenizer.

    Raises:
        FastDraftError: it is another kind of tokenizer, or its pattern is not mapped.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    parts = {} if backend is None else json.loads(backend.to_str())
    model, split = parts.get("model") or {}, parts.get("pre_tokenizer") or {}
    steps = split.get("pretokenizers", [split])
    kinds = [step.get("type") for step in steps]
    if model.get("type") == "BPE" and kinds and kinds[-1] == "ByteLevel":
        own_pattern = steps[-1].get("use_regex", True)
        if kinds == ["ByteLevel"] and own_pattern and not steps[0].get("add_prefix_space"):
            return "gpt-2"
        if kinds == ["Digits", "ByteLevel"] and own_pattern and steps[0].get("individual_digits"):
            return "smollm"
        if kinds == ["Split", "ByteLevel"] and not own_pattern:
            name = _PATTERNS.get(steps[0].get("pattern", {}).get("Regex", ""))
            if name is not None:
                return name
    raise FastDraftError(
        f"gguf: the tokenizer is not a byte-level BPE that is mapped; {SCRIPT}. Mapped: gpt-2, "
        "smollm, llama-bpe, qwen2"
    )


def _add_settings(
    writer: Any, config: Any, architecture: str, name: str, weight_type: GGUFType
) -> None:
    import gguf

    share = "ALL" if weight_type == "f32" else "MOSTLY"
    rope, head = config.rope_parameters, head_size(config)
    rotated = int(head * rope.get("partial_rotary_factor", 1.0))
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType[f"{share}_{weight_type.upper()}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(rotated)
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    writer.add_vocab_size(config.vocab_size)
    if architecture == "phi3":
        original = getattr(config, "original_max_position_embeddings", None)
        writer.add_rope_scaling_orig_ctx_len(original or config.max_position_embeddings)
        writer.add_sliding_window(getattr(config, "sliding_window", None) or 0)


def _add_tokenizer(
    writer: Any, tokenizer: PreTrainedTokenizerBase, pre: str, vocab_size: int, folder: Path
) -> None:
    import gguf

    added = tokenizer.added_tokens_decoder
    by_id = {index: token for token, index in tokenizer.get_vocab().items()}
    tokens, types = [], []
    for index in range(vocab_size):
        token = by_id.get(index)
        # The head may be padded beyond the tokenizer.
        tokens.append(f"[PAD{index}]" if token is None else token)
        if token is None:
            types.append(gguf.TokenType.UNUSED)
        elif index in added:
            special = added[index].special
            types.append(gguf.TokenType.CONTROL if special else gguf.TokenType.USER_DEFINED)
        else:
            types.append(gguf.TokenType.NORMAL)
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    merges = [m if isinstance(m, str) else " ".join(m) for m in parts["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    bos = tokenizer.bos_token_id
    writer.add_add_bos_token(bos is not None and tokenizer("a")["input_ids"][:1] == [bos])
    for name in ("bos", "eos", "unk", "pad"):
        index = getattr(tokenizer, f"{name}_token_id")
        if index is not None:
            getattr(writer, f"add_{name}_token_id")(index)
    # GGUF has one more end token than the tokenizer: the end of a turn.
    others = [end for end in stored_eos(folder) if end != tokenizer.eos_token_id]
    if others:
        writer.add_eot_token_id(others[0])
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def _tensors(model: Any, architecture: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every tensor with its name in GGUF; a tied head is not repeated."""
    import gguf
    import torch

    config = model.config
    arch = next(a for a, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        found = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise FastDraftError(f"gguf: '{name}' has no name in architecture {architecture}")
        # Here llama.cpp rotates neighboring pairs of a head, transformers its two halves.
        if architecture == "llama" and name.split(".")[-2] in ("q_proj", "k_proj"):
            heads = config.num_attention_heads
            heads = heads if "q_proj" in name else config.num_key_value_heads
            tensor = interleaved(tensor, heads)
        yield found, tensor
    rope = config.rope_parameters
    if rope["rope_type"] == "llama3":
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
        size = head_size(config)
        plain = rope["rope_theta"] ** (-torch.arange(0, size, 2, dtype=torch.float32) / size)
        yield "rope_freqs.weight", plain / scaled


def interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Return rows [heads·d, …] reordered within each head: i and i + d/2 next to each other."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.transpose(1, 2).reshape(weight.shape)


def _stored(tensor: torch.Tensor, weight_type: GGUFType) -> tuple[np.ndarray, Any]:
    import gguf

    array = tensor.float().contiguous().numpy()
    kinds = gguf.GGMLQuantizationType
    kind = kinds[weight_type.upper()]
    if array.ndim < 2:
        kind = kinds.F32
    elif array.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0]:  # no whole blocks of q8_0
        kind = kinds.F16
    return gguf.quantize(array, kind), kind
