"""What the target is asked to write: free text, its own instructions (Magpie), code to finish."""

from __future__ import annotations

import random
from collections.abc import Sequence, Set
from typing import TYPE_CHECKING

from fastdraft_hf._errors import FastDraftError
from fastdraft_hf._sequences import first_difference
from fastdraft_hf.data.heldout import CODE_INSTRUCTION
from fastdraft_hf.data.python_source import function_heads

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Conversation = Sequence[tuple[str, str]]
Prompts = list[tuple[int, ...]]

# What a user might begin and end with, all different: what the rendered ids of these chats share
# is the template's, and what tokens merge across its border is not. None begins with a digit: some
# tokenizers cut before one, and then also what stands before it, as they do nowhere else.
_PROBES = (
    "What is 5?",
    "Give me (x)",
    "日本語",
    "I am here.",
    '"Yes"',
    "Add 7 to 15",
    "élan vital!",
)


def chat_ids(
    tokenizer: PreTrainedTokenizerBase,
    instruction: str | Conversation,
    system_prompt: str | None = None,
) -> tuple[int, ...]:
    """Return the ids of a chat up to where the assistant speaks.

    Args:
        tokenizer: the target's; one without a chat template gets plain text.
        instruction: what the user says, or a conversation as (role, content).
        system_prompt: put before a conversation that has no system turn of its own.

    Raises:
        FastDraftError: the chat template refuses such a conversation.
    """
    turns = [("user", instruction)] if isinstance(instruction, str) else list(instruction)
    if system_prompt is not None and all(role != "system" for role, _ in turns):
        turns = [("system", system_prompt), *turns]
    if tokenizer.chat_template is None:
        return tuple(tokenizer("\n\n".join(content for _, content in turns))["input_ids"])
    from jinja2 import TemplateError

    try:
        text = tokenizer.apply_chat_template(
            [{"role": role, "content": content} for role, content in turns],
            tokenize=False,
            add_generation_prompt=True,
        )
    except TemplateError as error:
        roles = ", ".join(role for role, _ in turns)
        raise FastDraftError(
            f"the target's chat template refuses a conversation of {roles} ({error})"
        ) from error
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def template_ends(
    tokenizer: PreTrainedTokenizerBase, system_prompt: str | None = None
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the ids of the chat template before the user's words, and those after them.

    After them stand the end of the user's turn and what opens the answer. Magpie (Xu et al. 2024,
    arXiv 2406.08464) gives the first to the target, which then writes as the user.

    The ids are those that chats with different words share, so a space that a word's first token
    takes along (``[INST] Hello``) belongs to the word, as the target learned it.

    Raises:
        FastDraftError: there is no chat template, or it drops the user's words.
    """
    if tokenizer.chat_template is None:
        raise FastDraftError(
            "kind: Magpie needs a chat template, and the target's tokenizer has none; "
            "use kind: free"
        )
    chats = [chat_ids(tokenizer, words, system_prompt) for words in _PROBES]
    if len(set(chats)) < len(chats):
        raise FastDraftError("kind: the target's chat template drops the user's words")
    first, last = shared_ends(chats)
    if not first:
        raise FastDraftError(
            "kind: the target's chat template has nothing before the user's words for Magpie "
            "to start from; use kind: free"
        )
    return chats[0][:first], chats[0][len(chats[0]) - last :]


def shared_ends(texts: Sequence[Sequence[int]]) -> tuple[int, int]:
    """Return how many ids all texts share at their start, and how many at their end after that."""

    def shared(lists: list[list[int]]) -> int:
        # In alphabetical order the first and the last differ the most.
        low, high = min(lists, default=[]), max(lists, default=[])
        place = first_difference(low, high)
        return len(low) if place is None else place

    first = shared([list(ids) for ids in texts])
    return first, shared([list(ids[first:])[::-1] for ids in texts])


def magpie_prefix(
    tokenizer: PreTrainedTokenizerBase, system_prompt: str | None = None
) -> tuple[int, ...]:
    """Return the chat template's ids up to where the user would speak (`template_ends`)."""
    return template_ends(tokenizer, system_prompt)[0]


def answer_suffix(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Return the template's ids from the end of the user's words to where the answer starts."""
    return template_ends(tokenizer)[1]


def written_instruction(
    ids: Sequence[int], finish_reason: str, suffix: Sequence[int], special_ids: Set[int]
) -> tuple[int, ...] | None:
    """Return what the target wrote in the user's place, or ``None`` when it did not end.

    A turn ends where the target stopped, or where it wrote the template's own end of the turn: not
    every template ends the user's turn with a token that ends a text (Mistral's ``[/INST]``).

    Args:
        ids: what it wrote.
        finish_reason: ``stop`` or ``length``.
        suffix: of `template_ends`.
        special_ids: the tokenizer's special tokens.
    """
    written = tuple(ids)
    # The whole suffix, or its first token where that can be nothing else.
    end = tuple(suffix[:1] if suffix and suffix[0] in special_ids else suffix)
    if end:
        for place in range(len(written) - len(end) + 1):
            if written[place : place + len(end)] == end:
                return written[:place]
    return written[:-1] if finish_reason == "stop" else None


def special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Return the ids of every special token, also of those that have no role such as EOS."""
    added = tokenizer.added_tokens_decoder.items()
    return {*tokenizer.all_special_ids, *(token for token, what in added if what.special)}


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
    raise FastDraftError("kind: the tokenizer has neither BOS nor EOS to start free text from")


def code_instructions(seed: int) -> list[str]:
    """Return a "complete this function" instruction for every documented standard function."""
    heads = sorted(set(function_heads()))
    random.Random(seed).shuffle(heads)
    return [CODE_INSTRUCTION.format(head.rstrip()) for head in heads]
