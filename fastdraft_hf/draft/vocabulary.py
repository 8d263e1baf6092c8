"""Compare two vocabularies, and match the tokens of different ones by their text.

A draft gives probabilities to ids, so each must mean one token. Between different vocabularies,
byte-level tokenizers spell each byte as a printable character (``Ġ`` is a space), SentencePiece
ones use ``▁`` for a space and ``<0x0A>`` for a byte. Both are converted to bytes to be compared.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from fastdraft_hf._errors import FastDraftError
from fastdraft_hf.target.resolve import load_config, load_tokenizer

logger = logging.getLogger(__name__)

_SPECIAL = ("bos", "eos", "pad", "unk")

CONCLUSIONS = {
    "identical": "The same vocabulary: one can draft for the other as it is.",
    "padded": "The same tokens, padded to different rows: design.resize gives the draft the "
    "target's.",
    "extended": "The same token for every shared id: design.resize gives the draft the target's "
    "rows and tokenizer.",
    "different": "Different vocabularies: one cannot draft for the other. init: transplant can use "
    "its layers and embeddings.",
}


@dataclass(frozen=True)
class Vocabulary:
    """The vocabulary of a model.

    Attributes:
        name: the model's name, for reports.
        ids: token -> id.
        special: role (bos, eos, pad, unk) -> token.
        rows: number of ids the head scores, when known; more than the tokens where it is padded.
    """

    name: str
    ids: Mapping[str, int]
    special: Mapping[str, str | None]
    rows: int | None = None

    @classmethod
    def of_tokenizer(cls, tokenizer: PreTrainedTokenizerBase, name: str) -> Vocabulary:
        """Read a tokenizer. The rows are unknown."""
        special = {role: getattr(tokenizer, f"{role}_token", None) for role in _SPECIAL}
        return cls(name, tokenizer.get_vocab(), special)

    @classmethod
    def of_folder(
        cls, folder: Path, name: str | None = None, tokenizer: PreTrainedTokenizerBase | None = None
    ) -> Vocabulary:
        """Read the tokenizer and config of a model's folder; no weights.

        ``name`` is for reports, ``tokenizer`` the folder's own where it is already loaded.

        Raises:
            FastDraftError: its tokenizer or its config cannot be read.
        """
        tokenizer, rows = tokenizer or load_tokenizer(folder), None
        if (folder / "config.json").is_file():
            rows = load_config(folder).get_text_config(decoder=True).vocab_size
        return replace(cls.of_tokenizer(tokenizer, name or str(folder)), rows=rows)


@dataclass(frozen=True)
class VocabularyReport:
    """Two vocabularies compared id by id.

    Attributes:
        agreeing: number of ids that mean the same token in both.
        differing: number of ids that mean two tokens.
        verdict: the key of `CONCLUSIONS`, which explain it.
        problems: one sentence per difference.
    """

    agreeing: int
    differing: int
    verdict: str
    problems: list[str]


def compare_vocabularies(target: Vocabulary, draft: Vocabulary) -> VocabularyReport:
    """Compare two vocabularies id by id; vocabularies of the same length can still differ."""
    ours = {index: token for token, index in target.ids.items()}
    theirs = {index: token for token, index in draft.ids.items()}
    shared = ours.keys() & theirs.keys()
    differing = [i for i in sorted(shared) if ours[i] != theirs[i]]
    problems: list[str] = []
    verdict = "identical"
    if target.rows != draft.rows and None not in (target.rows, draft.rows):
        end = "" if differing else ": padding, which can be resized"
        problems.append(f"the heads score {target.rows:,} and {draft.rows:,} ids{end}")
        verdict = "padded"
    for name, tokens in ((draft.name, theirs), (target.name, ours)):
        if only := sorted(tokens.keys() - shared):
            shown = ", ".join(f"{i} {tokens[i]!r}" for i in only[:4]) + ", …" * (len(only) > 4)
            ids = f"{len(only):,} ids" if len(only) > 1 else "one id"
            problems.insert(0, f"{ids} only {name} has ({shown})")
            verdict = "extended"
    if differing:
        shown = "; ".join(f"{i}: {ours[i]!r} and {theirs[i]!r}" for i in differing[:3])
        ids = f"{len(differing):,} ids mean" if len(differing) > 1 else "one id means"
        problems.insert(0, f"{ids} different tokens ({shown})")
    if differing or not shared:
        verdict = "different"
    for role, token in target.special.items():
        if token != draft.special[role]:
            problems.append(f"{role}: {token!r} and {draft.special[role]!r}")
    agreeing = len(shared) - len(differing)
    return VocabularyReport(agreeing, len(differing), verdict, problems)


def check_vocabulary(
    target: Vocabulary | Path,
    other: Vocabulary | Path,
    key: str | None = None,
    *,
    donor: bool = False,
    resize: bool = False,
) -> VocabularyReport:
    """Raise unless ``other`` can draft for ``target``.

    Every shared id must mean the same token. Different EOS tokens are an error unless the draft
    gets the target's tokenizer (``donor``, ``resize``). Other differences cost acceptance at most:
    they are warnings for a draft and ignored for a donor.

    Args:
        target, other: vocabularies, or folders to read them from.
        key: the setting that named ``other``, for errors (``"design.donor"``).
        donor: whether only its weights are used.
        resize: whether tokens or rows (padding) that only one has are allowed.

    Raises:
        FastDraftError: they do not fit; the message says what differs and what to do.
    """
    prefix = f"{key}: " if key else ""
    if isinstance(target, Path):
        target = Vocabulary.of_folder(target, "the target")
    if isinstance(other, Path):
        try:
            other = Vocabulary.of_folder(other)
        except FastDraftError as error:
            raise FastDraftError(f"{prefix}{error}") from error
    report = compare_vocabularies(target, other)
    where, problems = f"{prefix}{other.name}", report.problems
    if report.verdict == "different":
        way = "a draft must have the target's own tokenizer"
        if donor:
            way = "init: transplant accepts a donor with another one"
        raise FastDraftError(f"{where}: its vocabulary is not the target's: {problems[0]}; {way}")
    if report.verdict != "identical" and not resize:
        what = (
            "does not have the target's rows"
            if report.verdict == "padded"
            else "is not the target's"
        )
        raise FastDraftError(
            f"{where}: its vocabulary {what}: {problems[0]}; the {report.agreeing:,} shared ids "
            f"agree, so set design.resize{'' if donor else ' with design.draft'}"
        )
    if donor:
        return report
    ours, theirs = target.special["eos"], other.special["eos"]
    if ours != theirs and not resize:
        raise FastDraftError(
            f"{where}: its EOS token is {theirs or 'missing'}, the target's {ours or 'missing'}; "
            "copy the target's tokenizer into its folder"
        )
    for problem in problems:
        logger.warning("%s: differs from the target: %s", where, problem)
    return report


_BYTE_TOKEN = re.compile(r"^<0x([0-9A-Fa-f]{2})>$")

# Tokens that mark a turn, by role; a tokenizer's own is the first that it has.
_TURN_ROLES = {
    "start of turn": ("<|im_start|>", "<start_of_turn>", "<|start_header_id|>", "<|start|>"),
    "end of turn": ("<|im_end|>", "<end_of_turn>", "<|eot_id|>", "<|end|>", "<|eot|>"),
}


def match_tokens(
    target: PreTrainedTokenizerBase, donor: PreTrainedTokenizerBase
) -> tuple[dict[int, list[int]], dict[str, int]]:
    """Find the donor's tokens for every token of the target.

    An ordinary token is matched with the donor's token of the same bytes, else with the pieces into
    which the donor's tokenizer splits its text, else (the donor normalizes that text, or it is part
    of a character) with the donor's longest tokens from left to right. A special token is matched
    by spelling, else by role (bos, eos, pad, unk, start and end of turn).

    Returns:
        the donor's ids by id of the target, at least one for each that is matched; and the number
        of tokens matched as ``same`` (one donor token of the same bytes), ``pieces`` and
        ``special``, and not at all (``none``).

    Raises:
        FastDraftError: one of the two has no ``tokenizer.json``.
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
    special = _match_special(target, donor, set(ours))
    pieces = {**same, **split, **special}
    counts = {"same": len(same), "pieces": len(split), "special": len(special)}
    return pieces, {**counts, "none": len(target.get_vocab()) - len(pieces)}


def token_bytes(tokenizer: PreTrainedTokenizerBase) -> dict[int, bytes]:
    """Return the bytes of each token by id, without special tokens."""
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
) -> dict[int, list[int]]:
    theirs, other_roles = donor.get_vocab(), _roles(donor)
    by_role: dict[str, str] = {}
    for role, token in _roles(target).items():
        if role in other_roles:
            by_role.setdefault(token, other_roles[role])
    special = {t: index for t, index in target.get_vocab().items() if index not in ordinary}
    others = {index: t if t in theirs else by_role.get(t) for t, index in special.items()}
    return {index: [theirs[other]] for index, other in others.items() if other is not None}


def _roles(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Return the token of each role that a tokenizer has, the marks of a turn first."""
    vocabulary = tokenizer.get_vocab()
    named = {r: (getattr(tokenizer, f"{r}_token", None),) for r in _SPECIAL}
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
