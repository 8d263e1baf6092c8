"""A byte-level BPE tokenizer built from the tokens and merges that a GGUF file carries.

transformers 5.5 converts the SmolLM2 tokenizer of a GGUF file without an error and wrongly
(spaces become ``<|endoftext|>``, the end token changes), and a draft trained on it is worthless.
So it is assembled here from the file's own fields and its facts are checked by the caller.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastdraft_hf._errors import FastDraftError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# The GGUF specification's token type of control tokens (`<|im_start|>` and the like).
_CONTROL = 3

# Pre-tokenizers by the name GGUF gives them (`tokenizer.ggml.pre`): whether digits are split
# one by one before the byte-level pattern. Others are refused: a near miss is silent poison.
_DIGITS_ONE_BY_ONE = {"smollm": True, "gpt-2": False}


def read_fields(gguf_file: Path) -> dict[str, Any]:
    """Return every ``tokenizer.*`` field of a GGUF file."""
    from gguf import GGUFReader

    reader = GGUFReader(str(gguf_file))
    return {k: f.contents() for k, f in reader.fields.items() if k.startswith("tokenizer.")}


def build_tokenizer(fields: dict[str, Any]) -> PreTrainedTokenizerFast:
    """Build the tokenizer a GGUF file describes.

    Args:
        fields: the file's ``tokenizer.*`` fields, as `read_fields` returns them.

    Raises:
        FastDraftError: the file's tokenizer is not a byte-level BPE of a kind known here.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    kind, pre = fields["tokenizer.ggml.model"], fields.get("tokenizer.ggml.pre", "gpt-2")
    if kind != "gpt2" or pre not in _DIGITS_ONE_BY_ONE:
        raise FastDraftError(
            f"GGUF tokenizer '{kind}' with pre-tokenizer '{pre}' is not supported; known: gpt2 "
            f"with {sorted(_DIGITS_ONE_BY_ONE)}. Give the model's Hugging Face folder instead."
        )
    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    backend = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    steps = [pre_tokenizers.Digits(individual_digits=True)] if _DIGITS_ONE_BY_ONE[pre] else []
    backend.pre_tokenizer = pre_tokenizers.Sequence([*steps, byte_level])
    backend.decoder = decoders.ByteLevel()
    types = fields["tokenizer.ggml.token_type"]
    control = [t for t, kind in zip(tokens, types, strict=True) if kind == _CONTROL]
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in control])

    def token(name: str) -> str | None:
        index = fields.get(f"tokenizer.ggml.{name}_token_id")
        return None if index is None else tokens[index]

    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=token("bos"),
        eos_token=token("eos"),
        unk_token=token("unknown"),
        pad_token=token("padding"),
        chat_template=fields.get("tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
    )
