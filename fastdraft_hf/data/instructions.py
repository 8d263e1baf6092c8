"""Which of the target's own instructions (Magpie) are worth answering."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence, Set
from typing import Any

from fastdraft_hf.data.filters import KEPT, Decode, RowFilters, in_a_loop, in_another_language
from fastdraft_hf.data.near_duplicates import NearDuplicates
from fastdraft_hf.data.prompts import written_instruction

SHORTEST = 5
# English prose has 1.2 to 1.5 tokens per word; made-up words have many more.
TOKENS_PER_WORD = 2.5
LONGEST_WORD = 30

# Words that ask, anywhere in a sentence.
_ASKING = re.compile(
    r"\?|\b(?:please|help|how|what|what's|why|which|who|whose|where|can you|could you|would you|"
    r"will you|do you|i need|i want|i wish|i'd like|i would like|i'm looking|i am looking|"
    r"i'm trying|i am trying|tell me|show me|give me|let's|let us|teach me|make me)\b",
    re.IGNORECASE,
)
# Verbs that ask, at the start of a sentence.
_ORDERS = re.compile(
    r"(?:^|[.!:;,\n]\s*)(?:also |then |now |first |and |or |to )?(?:add|analy[sz]e|answer|arrange|"
    r"assess|build|calculate|change|check|choose|classify|clean|combine|come up|compare|complete|"
    r"compose|compute|consider|construct|convert|correct|count|create|debug|decide|define|"
    r"demonstrate|describe|design|determine|develop|discuss|divide|draft|draw|edit|elaborate|"
    r"estimate|evaluate|examine|explain|explore|express|extract|fill|find|fix|format|formulate|"
    r"generate|guess|highlight|identify|imagine|implement|improve|include|infer|invent|list|"
    r"look|make|match|modify|name|organi[sz]e|outline|paraphrase|perform|pick|plan|predict|"
    r"prepare|present|pretend|produce|proofread|propose|prove|provide|rank|rate|read|rearrange|"
    r"recommend|refactor|remove|rephrase|replace|research|respond|return|reverse|review|revise|"
    r"rewrite|run|say|select|shorten|simplify|simulate|solve|sort|split|state|suggest|"
    r"summari[sz]e|take|tell|test|think|transform|translate|turn|update|use|verify|write)\b",
    re.IGNORECASE,
)
_ASSISTANT = re.compile(
    r"(?:sure[,!. ]|certainly[,!. ]|of course[,!. ]|here (?:is|are)\b|here's\b|as an ai\b|"
    r"i'm sorry|i apologi[sz]e|thank you for|you're welcome|i'd be happy|i'm happy to)",
    re.IGNORECASE,
)


def asks(text: str) -> bool:
    """Return whether an English text asks for something, judged by its words."""
    return bool(_ASKING.search(text) or _ORDERS.search(text.strip()))


def no_words(text: str, tokens: int) -> bool:
    """Return whether an English text consists of made-up words.

    Such a text has many tokens per word, or words of more than ``LONGEST_WORD`` letters.
    """
    words = text.split()
    if any(len(word) > LONGEST_WORD and word.isalpha() for word in words):
        return True
    # Code, numbers and formulas have many tokens per word too.
    letters = sum(c.isalpha() or c.isspace() for c in text)
    return letters >= 0.9 * len(text) and tokens > TOKENS_PER_WORD * max(1, len(words))


def keep_instructions(
    rows: Iterable[dict[str, Any]],
    decode: Decode,
    overlaps: Callable[[str], bool],
    *,
    suffix: Sequence[int] = (),
    special_ids: Set[int] = frozenset(),
    filters: RowFilters,
) -> tuple[list[tuple[int, ...]], Counter[str]]:
    """Return the instructions worth answering, as ids without the end of the turn, and counts.

    Reasons, in the order of the checks: ``cut off`` (the turn did not end), ``special token`` (a
    turn within a turn), ``too short`` (fewer than ``SHORTEST`` tokens), ``loop``, ``duplicate``,
    ``overlaps held-out text``, ``wrong language`` and, for English, ``speaks as the assistant``,
    ``asks nothing`` and ``no words``; last ``near duplicate``.

    Args:
        rows: completions of the template's start, by increasing index.
        decode: ids to text.
        overlaps: whether a text overlaps held-out text (`Decontaminator.overlaps`).
        suffix: the template's ids after the user's message (`prompts.template_ends`).
        special_ids: the tokenizer's special tokens.
        filters: the language, and the similarity from which a later instruction is dropped. The
            checks for English need language ``en``.
    """
    language, threshold = filters.language, filters.near_duplicates
    near = None if threshold is None else NearDuplicates(threshold)
    seen: set[tuple[int, ...]] = set()

    def judge(ids: tuple[int, ...] | None) -> str:
        if ids is None:
            return "cut off"
        if any(token in special_ids for token in ids):
            return "special token"
        if len(ids) < SHORTEST:
            return "too short"
        if in_a_loop(ids, tail=30, longest_period=10):
            return "loop"
        if ids in seen:
            return "duplicate"
        text = decode(ids)
        if overlaps(text):
            return "overlaps held-out text"
        if language is not None and in_another_language(text, language):
            return "wrong language"
        if language == "en":
            if _ASSISTANT.match(text.strip()):
                return "speaks as the assistant"
            if not asks(text):
                return "asks nothing"
            if no_words(text, len(ids)):
                return "no words"
        if near is not None and near.find_or_add(ids) is not None:
            return "near duplicate"
        seen.add(ids)
        return KEPT

    kept, reasons = [], Counter[str]()
    for row in rows:
        ids = written_instruction(row["completion_ids"], row["finish_reason"], suffix, special_ids)
        reason = judge(ids)
        reasons[reason] += 1
        if reason == KEPT and ids is not None:
            kept.append(ids)
    return kept, reasons
