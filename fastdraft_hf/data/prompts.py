"""Prompts for the target: chats, the start of free text, Magpie, functions to complete."""

from __future__ import annotations

import random
from collections.abc import Sequence, Set
from typing import TYPE_CHECKING

from fastdraft_hf._errors import FastDraftError
from fastdraft_hf._sequences import first_difference
from fastdraft_hf.data.installed import function_heads

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# The same wording for every code prompt, held out or trained on.
CODE_INSTRUCTION = "Complete this Python function:\n\n```python\n{}\n```"

Conversation = Sequence[tuple[str, str]]
Prompts = list[tuple[int, ...]]

# Messages with different starts and ends: the ids that all rendered chats share are the template's.
# None starts with a digit: some tokenizers split differently before one.
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
    """Return the ids of a chat up to the assistant's turn.

    Args:
        tokenizer: the target's. Without a chat template the chat is plain text.
        instruction: the user's message, or a conversation as (role, content).
        system_prompt: first turn of a conversation without a system turn.

    Raises:
        FastDraftError: the chat template refuses the conversation or drops the user's message, or
            there are several and none called default.
    """
    turns = [("user", instruction)] if isinstance(instruction, str) else list(instruction)
    if system_prompt is not None and all(role != "system" for role, _ in turns):
        turns = [("system", system_prompt), *turns]
    if tokenizer.chat_template is None:
        return tuple(tokenizer("\n\n".join(content for _, content in turns))["input_ids"])
    return tuple(tokenizer(_chat_text(tokenizer, turns), add_special_tokens=False)["input_ids"])


def _chat_text(tokenizer: PreTrainedTokenizerBase, turns: Conversation) -> str:
    """Render a conversation, its content as text or, as vision models read it, a list of parts.

    Raises:
        FastDraftError: the template drops what the user says either way.
    """
    text = _rendered(tokenizer, turns, parts=False)
    said = [content.strip() for role, content in turns if role == "user"]
    if not said or said[-1] in text:
        return text
    # A template may also edit the words: ask with one that it would keep.
    kept = [
        "rivers" in _rendered(tokenizer, [("user", "rivers")], parts) for parts in (False, True)
    ]
    if not any(kept):
        raise FastDraftError("kind: the target's chat template drops the user's message")
    return text if kept[0] else _rendered(tokenizer, turns, parts=True)


def _rendered(tokenizer: PreTrainedTokenizerBase, turns: Conversation, parts: bool) -> str:
    from jinja2 import TemplateError

    messages = [
        {"role": role, "content": [{"type": "text", "text": content}] if parts else content}
        for role, content in turns
    ]
    try:
        return str(
            tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        )
    except TemplateError as error:
        roles = ", ".join(role for role, _ in turns)
        raise FastDraftError(
            f"the target's chat template refuses a conversation of {roles} ({error})"
        ) from error
    except ValueError as error:  # several templates and none called default
        raise FastDraftError(
            f"target: {error} Set tokenizer.chat_template to one of them and save the tokenizer"
        ) from error


def template_ends(
    tokenizer: PreTrainedTokenizerBase, system_prompt: str | None = None
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the ids of the chat template before the user's message, and those after it.

    Those after it end the user's turn and open the answer. Magpie (Xu et al. 2024, arXiv
    2406.08464) prompts the target with those before it, so that it continues as the user.

    They are the ids that chats with different messages share, so a space that belongs to a word's
    first token (``[INST] Hello``) is not among them.

    Raises:
        FastDraftError: there is no chat template, or nothing in it before the user's message.
    """
    if tokenizer.chat_template is None:
        raise FastDraftError(
            "kind: magpie needs a chat template, and the target's tokenizer has none; "
            "use kind: free"
        )
    chats = [chat_ids(tokenizer, words, system_prompt) for words in _PROBES]
    first, last = shared_ends(chats)
    if not first:
        raise FastDraftError(
            "kind: the target's chat template has nothing before the user's message, which magpie "
            "needs; use kind: free"
        )
    return chats[0][:first], chats[0][len(chats[0]) - last :]


def shared_ends(texts: Sequence[Sequence[int]]) -> tuple[int, int]:
    """Return how many ids all texts share at their start, and how many of the rest at their end."""

    def shared(lists: list[list[int]]) -> int:
        # In lexicographic order the first and the last share the least.
        low, high = min(lists, default=[]), max(lists, default=[])
        position = first_difference(low, high)
        return len(low) if position is None else position

    first = shared([list(ids) for ids in texts])
    return first, shared([list(ids[first:])[::-1] for ids in texts])


def written_instruction(
    ids: Sequence[int], finish_reason: str, suffix: Sequence[int], special_ids: Set[int]
) -> tuple[int, ...] | None:
    """Return the instruction that the target generated, or ``None`` if it did not end.

    An instruction ends where the target stopped, or where it generated the template's own end of
    the turn: not every template ends the user's turn with a stop token (Mistral's ``[/INST]``).

    Args:
        ids: of the completion.
        finish_reason: ``stop`` or ``length``.
        suffix: of `template_ends`.
        special_ids: the tokenizer's special tokens.
    """
    written = tuple(ids)
    # The whole suffix, or only its first token if that is special.
    end = tuple(suffix[:1] if suffix and suffix[0] in special_ids else suffix)
    if end:
        for position in range(len(written) - len(end) + 1):
            if written[position : position + len(end)] == end:
                return written[:position]
    return written[:-1] if finish_reason == "stop" else None


def special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Return the ids of every special token, including those without a role such as EOS."""
    added = tokenizer.added_tokens_decoder.items()
    return {*tokenizer.all_special_ids, *(token for token, what in added if what.special)}


def free_prefix(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Return what starts a document in pre-training: ``<|endoftext|>`` or BOS.

    The BOS of ChatML models is a turn marker; their documents were separated by ``<|endoftext|>``,
    so that is preferred if the vocabulary has it.
    """
    vocabulary = tokenizer.get_vocab()
    if "<|endoftext|>" in vocabulary:
        return (vocabulary["<|endoftext|>"],)
    for special in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if special is not None:
            return (special,)
    raise FastDraftError("kind: free needs a tokenizer with BOS or EOS to start a document with")


def code_instructions(seed: int) -> list[str]:
    """Return a "complete this function" instruction for every documented standard function."""
    heads = sorted(set(function_heads()))
    random.Random(seed).shuffle(heads)
    return [CODE_INSTRUCTION.format(head.rstrip()) for head in heads]
