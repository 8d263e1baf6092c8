"""Compare two vocabularies: a draft gives probabilities to ids, so each must mean one token."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from fastdraft_hf._errors import FastDraftError
from fastdraft_hf.target.resolve import all_end_ids, load_config, load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_SPECIAL = ("bos", "eos", "pad", "unk")

Verdict = Literal["identical", "padded", "extended", "different"]

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
        ends: ids that end a completion, from generation config, config and tokenizer.
        rows: number of ids the head scores, when known; more than the tokens where it is padded.
    """

    name: str
    ids: Mapping[str, int]
    special: Mapping[str, str | None]
    ends: frozenset[int] = frozenset()
    rows: int | None = None

    @classmethod
    def of_tokenizer(cls, tokenizer: PreTrainedTokenizerBase, name: str) -> Vocabulary:
        """Read a tokenizer. The end is its EOS token, and the rows are unknown."""
        special = {role: getattr(tokenizer, f"{role}_token", None) for role in _SPECIAL}
        ends = {tokenizer.eos_token_id} - {None}
        return cls(name, tokenizer.get_vocab(), special, frozenset(ends))

    @classmethod
    def of_folder(
        cls, folder: Path, name: str | None = None, tokenizer: PreTrainedTokenizerBase | None = None
    ) -> Vocabulary:
        """Read the tokenizer, config and generation config of a model's folder; no weights.

        Args:
            folder: the model's folder.
            name: for reports; by default the folder.
            tokenizer: the folder's own, where it is already loaded.

        Raises:
            FastDraftError: its tokenizer or its config cannot be read.
        """
        tokenizer, rows = tokenizer or load_tokenizer(folder), None
        if (folder / "config.json").is_file():
            rows = load_config(folder).get_text_config(decoder=True).vocab_size
        found = cls.of_tokenizer(tokenizer, name or str(folder))
        return replace(found, ends=frozenset(all_end_ids(folder, tokenizer)), rows=rows)

    def named_ends(self) -> str:
        """Return the end ids with their tokens."""
        tokens = {index: token for token, index in self.ids.items() if index in self.ends}
        return ", ".join(f"{i} {tokens.get(i, '?')}" for i in sorted(self.ends)) or "nothing"


@dataclass(frozen=True)
class VocabularyReport:
    """Two vocabularies compared id by id.

    Attributes:
        target, draft: the two.
        agreeing: number of ids that mean the same token in both.
        differing: number of ids that mean two tokens.
        verdict: the key of `CONCLUSIONS`, which explain it.
        problems: one sentence per difference.
    """

    target: Vocabulary
    draft: Vocabulary
    agreeing: int
    differing: int
    verdict: Verdict
    problems: list[str]


def compare_vocabularies(target: Vocabulary, draft: Vocabulary) -> VocabularyReport:
    """Compare two vocabularies id by id; vocabularies of the same length can still differ."""
    ours = {index: token for token, index in target.ids.items()}
    theirs = {index: token for token, index in draft.ids.items()}
    shared = ours.keys() & theirs.keys()
    differing = [i for i in sorted(shared) if ours[i] != theirs[i]]
    problems: list[str] = []
    verdict: Verdict = "identical"
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
    if target.ends != draft.ends:
        problems.append(f"ends on {target.named_ends()} and on {draft.named_ends()}")
    agreeing = len(shared) - len(differing)
    return VocabularyReport(target, draft, agreeing, len(differing), verdict, problems)


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
