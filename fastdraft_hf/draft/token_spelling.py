"""Match the tokens of two tokenizers by their text.

Byte-level tokenizers spell each byte as a printable character (``Ġ`` is a space), SentencePiece
ones use ``▁`` for a space and ``<0x0A>`` for a byte. Both are converted to bytes to be compared.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from fastdraft_hf._errors import FastDraftError, nearest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BYTE_TOKEN = re.compile(r"^<0x([0-9A-Fa-f]{2})>$")

# Tokens that mark a turn, by role; a tokenizer's own is the first that it has.
_TURN_ROLES = {
    "start of turn": ("<|im_start|>", "<start_of_turn>", "<|start_header_id|>", "<|start|>"),
    "end of turn": ("<|im_end|>", "<end_of_turn>", "<|eot_id|>", "<|end|>", "<|eot|>"),
}


class TokenMatches(NamedTuple):
    """For each id of the target, the donor's ids whose embeddings are averaged.

    Attributes:
        pieces: target id -> donor ids, at least one; unmatched ids are missing.
        special: target token -> donor token, of special and given tokens.
        counts: tokens matched as ``same`` (one donor token of the same bytes), ``pieces`` and
            ``special``, and not at all (``none``).
    """

    pieces: dict[int, list[int]]
    special: dict[str, str]
    counts: dict[str, int]


def match_tokens(
    target: PreTrainedTokenizerBase,
    donor: PreTrainedTokenizerBase,
    given: Mapping[str, str] | None = None,
) -> TokenMatches:
    """Find the donor's tokens for every token of the target.

    An ordinary token is matched with the donor's token of the same bytes, else with the pieces into
    which the donor's tokenizer splits its text, else (the donor normalizes that text, or it is part
    of a character) with the donor's longest tokens from left to right. A special token is matched
    by spelling, else by role (bos, eos, pad, unk, start and end of turn). ``given`` overrides both.

    Raises:
        FastDraftError: one of the two has no ``tokenizer.json``, or not a token of ``given``.
    """
    ours, theirs = token_bytes(target), token_bytes(donor)
    names = {index: token for token, index in donor.get_vocab().items()}
    # Where several tokens have one text, prefer pieces over bytes, then the lowest id.
    order = sorted(theirs, key=lambda i: (not _BYTE_TOKEN.match(names[i]), -i))
    by_bytes = {theirs[index]: index for index in order}
    same = {index: [by_bytes[text]] for index, text in ours.items() if text in by_bytes}
    others = {index: text for index, text in ours.items() if index not in same}
    longest = max(map(len, by_bytes), default=0)
    spelled = _spelled(list(others.values()), donor, theirs)
    split = {
        index: ids
        for index, text in others.items()
        if (ids := spelled.get(text) or _longest_pieces(text, by_bytes, longest))
    }
    vocabulary, other_vocabulary = target.get_vocab(), donor.get_vocab()
    given = given or {}
    named = [(token, vocabulary, "target") for token in given]
    for token, known, whose in [*named, *((t, other_vocabulary, "donor") for t in given.values())]:
        if token not in known:
            hint = nearest(token, [name for name in known if name[:1] == token[:1]])
            raise FastDraftError(f"design.token_map: the {whose} has no token '{token}'{hint}")
    special = {**_match_special(target, donor, set(ours)), **given}
    chosen = {vocabulary[t]: [other_vocabulary[other]] for t, other in special.items()}
    pieces = {**same, **split, **chosen}
    counts = {"same": len(same.keys() - chosen.keys()), "pieces": len(split.keys() - chosen.keys())}
    counts |= {"special": len(chosen), "none": len(vocabulary) - len(pieces)}
    return TokenMatches(pieces, special, counts)


def token_bytes(tokenizer: PreTrainedTokenizerBase) -> dict[int, bytes]:
    """Return the bytes of each token by id, without special tokens."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    decoder = json.dumps(json.loads(_backend(tokenizer).to_str()).get("decoder"))
    added = tokenizer.added_tokens_decoder
    special = {*tokenizer.all_special_ids, *(i for i, t in added.items() if t.special)}
    byte_of = {c: b for b, c in bytes_to_unicode().items()} if "ByteLevel" in decoder else {}
    result = {}
    for token, index in tokenizer.get_vocab().items():
        if index in special:
            continue
        if not byte_of and index not in added:
            byte = _BYTE_TOKEN.match(token)
            result[index] = bytes([int(byte[1], 16)]) if byte else token.replace("▁", " ").encode()
        elif index not in added and all(char in byte_of for char in token):
            result[index] = bytes(byte_of[char] for char in token)
        else:
            result[index] = token.encode()
    return result


def _spelled(
    texts: list[bytes], tokenizer: PreTrainedTokenizerBase, known: Mapping[int, bytes]
) -> dict[bytes, list[int]]:
    """Return the ids of each text that a tokenizer encodes without changing it."""
    found: dict[bytes, list[int]] = {}
    # Many SentencePiece tokenizers add a space before every text, so try without its own too.
    for cut in (0, 1):
        left = [t for t in texts if t not in found and (not cut or t[:1] == b" ")]
        asked = [t[cut:].decode(errors="replace") for t in left]
        encoded = _backend(tokenizer).encode_batch(asked, add_special_tokens=False)
        for text, encoding in zip(left, encoded, strict=True):
            if b"".join(known.get(i, b"") for i in encoding.ids) == text:
                found[text] = list(encoding.ids)
    return found


def _match_special(
    target: PreTrainedTokenizerBase, donor: PreTrainedTokenizerBase, ordinary: set[int]
) -> dict[str, str]:
    theirs, found = donor.get_vocab(), {}
    other_roles = _roles(donor)
    by_role: dict[str, str] = {}
    for role, token in _roles(target).items():
        if role in other_roles:
            by_role.setdefault(token, other_roles[role])
    for token, index in target.get_vocab().items():
        other = token if token in theirs else by_role.get(token)
        if index not in ordinary and other is not None:
            found[token] = other
    return found


def _roles(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Return the token of each role that a tokenizer has, the marks of a turn first."""
    vocabulary = tokenizer.get_vocab()
    named = {r: (getattr(tokenizer, f"{r}_token", None),) for r in ("bos", "eos", "pad", "unk")}
    wanted = {**_TURN_ROLES, **named}
    own = {role: [s for s in names if s in vocabulary] for role, names in wanted.items()}
    found = {role: str(names[0]) for role, names in own.items() if names}
    # A model without a mark for it ends a turn with its end of text.
    if "eos" in found:
        found.setdefault("end of turn", found["eos"])
    return found


def _longest_pieces(text: bytes, by_bytes: Mapping[bytes, int], longest: int) -> list[int]:
    """Return the longest tokens that spell ``text`` from left to right, [] if none do."""
    ids, start = [], 0
    while start < len(text):
        for end in range(min(len(text), start + longest), start, -1):
            if text[start:end] in by_bytes:
                ids.append(by_bytes[text[start:end]])
                start = end
                break
        else:
            return []
    return ids


def _backend(tokenizer: PreTrainedTokenizerBase) -> Any:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise FastDraftError(
            f"{tokenizer.name_or_path}: a fast tokenizer (tokenizer.json) is needed"
        )
    return backend
