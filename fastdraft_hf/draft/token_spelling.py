"""What a token's text is, however its tokenizer writes it, and which tokens of another spell it.

Byte-level tokenizers write each byte as a printable character (``Ġ`` is a space), SentencePiece
ones write ``▁`` for a space and ``<0x0A>`` for a byte. Both are read back to bytes, so that two
vocabularies can be compared.
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

# Tokens that mark a turn, by what they do; the first that a tokenizer has is its own.
_TURN_ROLES = {
    "start of turn": ("<|im_start|>", "<start_of_turn>", "<|start_header_id|>", "<|start|>"),
    "end of turn": ("<|im_end|>", "<end_of_turn>", "<|eot_id|>", "<|end|>", "<|eot|>"),
}
_ATTRIBUTES = ("bos", "eos", "pad", "unk")


@dataclass
class TokenMatches:
    """For each id of the target, the donor's ids whose embeddings are averaged.

    Attributes:
        pieces: target id -> donor ids, at least one; an id that is missing has no match.
        how: target id -> ``same`` (one donor token of the same bytes), ``pieces``, ``special``
            (by role) or ``given``.
        special: target token -> donor token, of those matched by role or given.
        total: number of tokens of the target.
    """

    total: int
    pieces: dict[int, list[int]] = field(default_factory=dict)
    how: dict[int, str] = field(default_factory=dict)
    special: dict[str, str] = field(default_factory=dict)

    def counts(self) -> dict[str, int]:
        """Return how many tokens were matched in which way."""
        found = dict.fromkeys(("same", "pieces", "special", "given"), 0)
        for kind in self.how.values():
            found[kind] += 1
        return {**found, "none": self.total - len(self.how)}


def token_bytes(tokenizer: PreTrainedTokenizerBase) -> dict[int, bytes]:
    """Return the bytes that each ordinary token stands for, by id; special ones are left out."""
    decoder = json.dumps(json.loads(_backend(tokenizer).to_str()).get("decoder"))
    special = set(tokenizer.all_special_ids)
    special |= {i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    added = tokenizer.added_tokens_decoder
    byte_of = _byte_alphabet() if "ByteLevel" in decoder else None
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


def match_tokens(
    target: PreTrainedTokenizerBase,
    donor: PreTrainedTokenizerBase,
    given: Mapping[str, str] | None = None,
) -> TokenMatches:
    """Find the donor's tokens for every token of the target.

    Ordinary tokens: the donor's token of the same bytes, else the pieces the donor's tokenizer
    makes of the text, else (text it spells with more, or half a character) the longest of its
    tokens one after another. Special tokens: ``given``, else the same spelling, else the same role
    (bos, eos, pad, unk, start and end of turn).

    Raises:
        FastDraftError: ``given`` names a token that one of the two does not have.
    """
    ours, theirs = token_bytes(target), token_bytes(donor)
    by_bytes: dict[bytes, int] = {}
    # Of several spellings of one text a piece comes before a byte, then the first id.
    names = {index: token for token, index in donor.get_vocab().items()}
    for index in sorted(theirs, key=lambda i: (not _BYTE_TOKEN.match(names[i]), -i)):
        by_bytes[theirs[index]] = index
    matches = TokenMatches(len(target.get_vocab()))
    _match_special(target, donor, given or {}, matches)
    asked = []
    for index, text in ours.items():
        if index in matches.pieces:
            continue
        if text in by_bytes:
            matches.pieces[index], matches.how[index] = [by_bytes[text]], "same"
        else:
            asked.append((index, text))
    longest = max(map(len, by_bytes), default=0)
    spelt = _spelt([text for _, text in asked], donor, theirs)
    for index, text in asked:
        ids = spelt.get(text) or _longest_pieces(text, by_bytes, longest)
        if ids:
            matches.pieces[index], matches.how[index] = ids, "pieces"
    return matches


def _spelt(
    texts: list[bytes], tokenizer: PreTrainedTokenizerBase, known: Mapping[int, bytes]
) -> dict[bytes, list[int]]:
    """Return the ids a tokenizer gives each text, of those that spell just that text."""
    found: dict[bytes, list[int]] = {}
    # Many SentencePiece tokenizers put a space before every text; without its own, a text that
    # begins with one is then spelt exactly.
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
    matches: TokenMatches,
) -> None:
    ours, theirs = target.get_vocab(), donor.get_vocab()
    for token, other in given.items():
        for name, vocabulary, whose in ((token, ours, "target"), (other, theirs, "donor")):
            if name not in vocabulary:
                raise FastDraftError(
                    f"design.token_map: the {whose} has no token '{name}'"
                    f"{nearest(name, [t for t in vocabulary if t.startswith(name[:1])])}"
                )
        matches.pieces[ours[token]], matches.how[ours[token]] = [theirs[other]], "given"
        matches.special[token] = other
    ordinary = token_bytes(target)
    roles, other_roles = _roles(target), _roles(donor)
    for token, index in ours.items():
        if index in ordinary or index in matches.pieces:
            continue
        role = next((r for r, t in roles.items() if t == token and r in other_roles), None)
        other = token if token in theirs else other_roles[role] if role else ""
        if other:
            matches.pieces[index], matches.how[index] = [theirs[other]], "special"
            matches.special[token] = other


def _roles(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Return the token of each role that a tokenizer has. A turn's marks come first."""
    vocabulary = tokenizer.get_vocab()
    found = {}
    for role, spellings in _TURN_ROLES.items():
        own = next((s for s in spellings if s in vocabulary), None)
        if own is not None:
            found[role] = own
    for name in _ATTRIBUTES:
        token = getattr(tokenizer, f"{name}_token", None)
        if token is not None and token in vocabulary:
            found[name] = token
    # A model that was never taught turns ends what it says with its end of text.
    if "end of turn" not in found and "eos" in found:
        found["end of turn"] = found["eos"]
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


def _byte_alphabet() -> dict[str, int]:
    """Return the byte that each character of a byte-level vocabulary stands for (as in GPT-2).

    Printable characters of Latin-1 stand for themselves; the rest were given the characters from
    256 on, in their order.
    """
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in set(plain)]
    return {
        **{chr(byte): byte for byte in plain},
        **{chr(256 + place): byte for place, byte in enumerate(rest)},
    }


def _backend(tokenizer: PreTrainedTokenizerBase) -> Any:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise FastDraftError(
            f"{tokenizer.name_or_path}: a fast tokenizer (tokenizer.json) is needed"
        )
    return backend
