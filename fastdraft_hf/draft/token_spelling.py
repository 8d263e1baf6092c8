"""Match the tokens of two tokenizers by their text.

Byte-level tokenizers spell each byte as a printable character (``Ġ`` is a space), SentencePiece
ones use ``▁`` for a space and ``<0x0A>`` for a byte. Both are converted to bytes to be compared.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fastdraft_hf._errors import FastDraftError, nearest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BYTE_TOKEN = re.compile(r"^<0x([0-9A-Fa-f]{2})>$")

# Tokens that mark a turn, by role; a tokenizer's own is the first that it has.
_TURN_ROLES = {
    "start of turn": ("<|im_start|>", "<start_of_turn>", "<|start_header_id|>", "<|start|>"),
    "end of turn": ("<|im_end|>", "<end_of_turn>", "<|eot_id|>", "<|end|>", "<|eot|>"),
}


@dataclass
class TokenMatches:
    """For each id of the target, the donor's ids whose embeddings are averaged.

    Attributes:
        total: number of tokens of the target.
        pieces: target id -> donor ids, at least one; unmatched ids are missing.
        how: target id -> ``same`` (one donor token of the same bytes), ``pieces``, ``special``
            (by spelling or role) or ``given``.
        special: target token -> donor token, of the special and given ones.
    """

    total: int
    pieces: dict[int, list[int]] = field(default_factory=dict)
    how: dict[int, str] = field(default_factory=dict)
    special: dict[str, str] = field(default_factory=dict)

    def counts(self) -> dict[str, int]:
        """Return how many tokens were matched in which way."""
        kinds = list(self.how.values())
        found = {kind: kinds.count(kind) for kind in ("same", "pieces", "special", "given")}
        return {**found, "none": self.total - len(kinds)}


def match_tokens(
    target: PreTrainedTokenizerBase,
    donor: PreTrainedTokenizerBase,
    given: Mapping[str, str] | None = None,
) -> TokenMatches:
    """Find the donor's tokens for every token of the target.

    An ordinary token is matched with the donor's token of the same bytes, else with the pieces into
    which the donor's tokenizer splits its text, else (the donor normalizes that text, or it is part
    of a character) with the donor's longest tokens from left to right. A special token is matched
    by ``given``, else by spelling, else by role (bos, eos, pad, unk, start and end of turn).

    Raises:
        FastDraftError: ``given`` names a token that one of the two does not have.
    """
    ours, theirs = token_bytes(target), token_bytes(donor)
    by_bytes: dict[bytes, int] = {}
    # Where several tokens have one text, prefer pieces over bytes, then the lowest id.
    names = {index: token for token, index in donor.get_vocab().items()}
    for index in sorted(theirs, key=lambda i: (not _BYTE_TOKEN.match(names[i]), -i)):
        by_bytes[theirs[index]] = index
    matches = TokenMatches(len(target.get_vocab()))
    _match_special(target, donor, given or {}, set(ours), matches)
    unmatched = []
    for index, text in ours.items():
        if index in matches.pieces:
            continue
        if text in by_bytes:
            matches.pieces[index], matches.how[index] = [by_bytes[text]], "same"
        else:
            unmatched.append((index, text))
    longest = max(map(len, by_bytes), default=0)
    spelled = _spelled([text for _, text in unmatched], donor, theirs)
    for index, text in unmatched:
        ids = spelled.get(text) or _longest_pieces(text, by_bytes, longest)
        if ids:
            matches.pieces[index], matches.how[index] = ids, "pieces"
    return matches


def token_bytes(tokenizer: PreTrainedTokenizerBase) -> dict[int, bytes]:
    """Return the bytes of each token by id, without special tokens."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    decoder = json.dumps(json.loads(_backend(tokenizer).to_str()).get("decoder"))
    added = tokenizer.added_tokens_decoder
    special = {*tokenizer.all_special_ids, *(i for i, t in added.items() if t.special)}
    byte_of = {c: b for b, c in bytes_to_unicode().items()} if "ByteLevel" in decoder else None
    result = {}
    for token, index in tokenizer.get_vocab().items():
        if index in special:
            continue
        if index in added:
            result[index] = token.encode()
        elif byte_of is not None:
            known = all(char in byte_of for char in token)
            result[index] = bytes(byte_of[c] for c in token) if known else token.encode()
        else:
            byte = _BYTE_TOKEN.match(token)
            result[index] = bytes([int(byte[1], 16)]) if byte else token.replace("▁", " ").encode()
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
    target: PreTrainedTokenizerBase,
    donor: PreTrainedTokenizerBase,
    given: Mapping[str, str],
    ordinary: set[int],
    matches: TokenMatches,
) -> None:
    ours, theirs = target.get_vocab(), donor.get_vocab()

    def match(token: str, other: str, how: str) -> None:
        matches.pieces[ours[token]], matches.how[ours[token]] = [theirs[other]], how
        matches.special[token] = other

    for token, other in given.items():
        for name, vocabulary, whose in ((token, ours, "target"), (other, theirs, "donor")):
            if name not in vocabulary:
                raise FastDraftError(
                    f"design.token_map: the {whose} has no token '{name}'"
                    f"{nearest(name, [t for t in vocabulary if t.startswith(name[:1])])}"
                )
        match(token, other, "given")
    roles, other_roles = _roles(target), _roles(donor)
    for token, index in ours.items():
        if index in ordinary or index in matches.pieces:
            continue
        if token in theirs:
            match(token, token, "special")
        elif role := next((r for r, t in roles.items() if t == token and r in other_roles), None):
            match(token, other_roles[role], "special")


def _roles(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Return the token of each role that a tokenizer has, the marks of a turn first."""
    vocabulary = tokenizer.get_vocab()
    found = {}
    for role, spellings in _TURN_ROLES.items():
        own = next((s for s in spellings if s in vocabulary), None)
        if own is not None:
            found[role] = own
    for name in ("bos", "eos", "pad", "unk"):
        token = getattr(tokenizer, f"{name}_token", None)
        if token is not None and token in vocabulary:
            found[name] = token
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
