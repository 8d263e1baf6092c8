"""What the target is asked to write: free text, its own instructions (Magpie), code to finish."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fastdraft_hf._errors import FastDraftError
from fastdraft_hf.data.heldout import CODE_INSTRUCTION
from fastdraft_hf.data.python_source import function_heads

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MARK = "FASTDRAFT-USER-TURN"


def chat_ids(
    tokenizer: PreTrainedTokenizerBase, instruction: str | Sequence[tuple[str, str]]
) -> tuple[int, ...]:
    """Return the ids of a chat up to where the assistant speaks.

    Args:
        tokenizer: the target's; one without a chat template gets plain text.
        instruction: what the user says, or a conversation as (role, content).
    """
    turns = [("user", instruction)] if isinstance(instruction, str) else instruction
    if tokenizer.chat_template is None:
        return tuple(tokenizer("\n\n".join(content for _, content in turns))["input_ids"])
    text = tokenizer.apply_chat_template(
        [{"role": role, "content": content} for role, content in turns],
        tokenize=False,
        add_generation_prompt=True,
    )
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def _template_parts(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """Split a rendered one-turn chat at the user's words: what stands before, what after."""
    if tokenizer.chat_template is None:
        raise FastDraftError(
            "generate: Magpie needs a chat template, and the target's tokenizer has none; "
            "use kind: free"
        )
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": _MARK}], tokenize=False, add_generation_prompt=True
    )
    before, found, after = text.partition(_MARK)
    if not found:
        raise FastDraftError("generate: the target's chat template drops the user's words")
    return before, after


def magpie_prefix(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Return the chat template's ids up to where the user would speak (Magpie, Xu et al. 2024)."""
    return tuple(tokenizer(_template_parts(tokenizer)[0], add_special_tokens=False)["input_ids"])


def answer_suffix(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Return the template's ids from the end of the user's words to where the answer starts."""
    return tuple(tokenizer(_template_parts(tokenizer)[1], add_special_tokens=False)["input_ids"])


def free_prefix(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Return what opens a document in pre-training: ``<|endoftext|>`` or BOS.

    Chat models of the ChatML kind name a turn marker as BOS; their documents were divided by
    ``<|endoftext|>``, so that is preferred where the vocabulary has it.
    """
    vocabulary = tokenizer.get_vocab()
    if "<|endoftext|>" in vocabulary:
        return (vocabulary["<|endoftext|>"],)
    for special in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if special is not None:
            return (special,)
    raise FastDraftError("generate: the tokenizer has neither BOS nor EOS to start free text from")


def code_instructions(seed: int) -> list[str]:
    """Return a "complete this function" instruction for every documented standard function."""
    heads = sorted(set(function_heads()))
    random.Random(seed).shuffle(heads)
    return [CODE_INSTRUCTION.format(head.rstrip()) for head in heads]
