"""Compare two vocabularies: a draft gives probabilities to ids, so each must mean one token."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fastdraft_hf._errors import FastDraftError
from fastdraft_hf.target.resolve import all_end_ids, load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_SPECIAL = ("bos", "eos", "pad", "unk")

Verdict = Literal["identical", "padded", "extended", "different"]

_CONCLUSIONS = {
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
    def of_tokenizer(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        name: str,
        ends: Collection[int] | None = None,
        rows: int | None = None,
    ) -> Vocabulary:
        """Read a tokenizer. By default it ends on its EOS token, and the rows are unknown."""
        special = {role: getattr(tokenizer, f"{role}_token", None) for role in _SPECIAL}
        if ends is None:
            ends = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
        return cls(name, tokenizer.get_vocab(), special, frozenset(ends), rows)

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
        from transformers import AutoConfig

        tokenizer = tokenizer or load_tokenizer(folder)
        rows = None
        if (folder / "config.json").is_file():
            try:
                config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
            except (OSError, ValueError) as error:
                reason = " ".join(str(error).split())[:200]
                raise FastDraftError(f"no config can be read in {folder} ({reason})") from error
            rows = int(config.get_text_config(decoder=True).vocab_size)
        return cls.of_tokenizer(
            tokenizer, name or str(folder), all_end_ids(folder, tokenizer), rows
        )

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
        differing: (id, token in the target, token in the draft), of ids that mean two tokens.
        only_target, only_draft: id -> token, of ids that only one of them has.
    """

    target: Vocabulary
    draft: Vocabulary
    agreeing: int
    differing: tuple[tuple[int, str, str], ...]
    only_target: Mapping[int, str]
    only_draft: Mapping[int, str]

    @property
    def special(self) -> dict[str, tuple[str | None, str | None]]:
        """The special tokens that differ: role -> (target's token, draft's token)."""
        ours, theirs = self.target.special, self.draft.special
        pairs = {role: (ours.get(role), theirs.get(role)) for role in _SPECIAL}
        return {role: pair for role, pair in pairs.items() if pair[0] != pair[1]}

    @property
    def verdict(self) -> Verdict:
        """The result of the comparison.

        ``identical``: the same token for every id, and the same rows. ``padded``: the same tokens,
        different numbers of rows. ``extended``: the same token for every shared id, and one or both
        have more. ``different``: some id means two tokens.
        """
        if self.differing or not self.agreeing:
            return "different"
        if self.only_target or self.only_draft:
            return "extended"
        return "padded" if self._rows_differ else "identical"

    @property
    def conclusion(self) -> str:
        """One sentence: whether one can draft for the other, and what to do."""
        return _CONCLUSIONS[self.verdict]

    @property
    def _rows_differ(self) -> bool:
        rows = (self.target.rows, self.draft.rows)
        return None not in rows and rows[0] != rows[1]

    def problems(self) -> list[str]:
        """Return one sentence per difference."""
        found = []
        if self.differing:
            shown = "; ".join(f"{i}: {a!r} and {b!r}" for i, a, b in self.differing[:3])
            number = len(self.differing)
            ids = f"{number:,} ids mean" if number > 1 else "one id means"
            found.append(f"{ids} different tokens ({shown})")
        for side, extra in ((self.target, self.only_target), (self.draft, self.only_draft)):
            if extra:
                shown = ", ".join(f"{i} {t!r}" for i, t in list(extra.items())[:4])
                dots = ", …" if len(extra) > 4 else ""
                ids = f"{len(extra):,} ids" if len(extra) > 1 else "one id"
                found.append(f"{ids} only {side.name} has ({shown}{dots})")
        if self._rows_differ:
            end = "" if self.differing else ": padding, which can be resized"
            found.append(f"the heads score {self.target.rows:,} and {self.draft.rows:,} ids{end}")
        found += [
            f"{role}: {ours!r} and {theirs!r}" for role, (ours, theirs) in self.special.items()
        ]
        if self.target.ends != self.draft.ends:
            found.append(f"ends on {self.target.named_ends()} and on {self.draft.named_ends()}")
        return found

    def rows(self) -> list[dict[str, str]]:
        """Return the comparison as a table, one dictionary per row."""
        both = (self.target, self.draft)
        table: list[tuple[str, list[Any]]] = [
            ("tokens", [len(v.ids) for v in both]),
            ("rows of the head", [v.rows or "?" for v in both]),
            ("ids that agree", [self.agreeing] * 2),
            ("ids that differ", [len(self.differing)] * 2),
            ("ids the other lacks", [len(self.only_target), len(self.only_draft)]),
            *((role, [v.special.get(role) for v in both]) for role in _SPECIAL),
            ("ends on", [v.named_ends() for v in both]),
        ]
        names = ("", self.target.name, f"{self.draft.name} ")  # a model compared with itself
        return [
            dict(zip(names, [what, *map(_cell, values)], strict=True)) for what, values in table
        ]


def _cell(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


def compare_vocabularies(target: Vocabulary, draft: Vocabulary) -> VocabularyReport:
    """Compare two vocabularies id by id; vocabularies of the same length can still differ."""
    ours = {index: token for token, index in target.ids.items()}
    theirs = {index: token for token, index in draft.ids.items()}
    shared = ours.keys() & theirs.keys()
    differing = tuple((i, ours[i], theirs[i]) for i in sorted(shared) if ours[i] != theirs[i])
    return VocabularyReport(
        target,
        draft,
        len(shared) - len(differing),
        differing,
        {i: ours[i] for i in sorted(ours.keys() - shared)},
        {i: theirs[i] for i in sorted(theirs.keys() - shared)},
    )


def check_vocabulary(
    target: Vocabulary | Path,
    other: Vocabulary | Path,
    key: str | None = None,
    *,
    donor: bool = False,
    resize: bool = False,
) -> VocabularyReport:
    """Raise unless ``other`` can draft for ``target``.

    Every shared id must mean the same token, and neither may have tokens or rows (padding) that the
    other lacks, unless ``resize`` is set. The EOS tokens of the tokenizers must be the same, unless
    the draft gets the target's tokenizer (``donor``, ``resize``). Other differences (BOS, padding
    and unknown tokens, further end ids) cost acceptance at most: they are warnings for a draft and
    ignored for a donor.

    Args:
        target, other: vocabularies, or folders to read them from.
        key: the setting that named ``other``, for errors (``"design.donor"``).
        donor: whether only its weights are used.
        resize: whether rows may be added or dropped where every shared id agrees.

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
    where, problems = f"{prefix}{other.name}", report.problems()
    if report.verdict == "different":
        way = (
            "init: transplant accepts a donor with another one"
            if donor
            else "a draft must have the target's own tokenizer"
        )
        raise FastDraftError(f"{where}: its vocabulary is not the target's: {problems[0]}; {way}")
    if report.verdict != "identical" and not resize:
        what = "has not the target's rows" if report.verdict == "padded" else "is not the target's"
        raise FastDraftError(
            f"{where}: its vocabulary {what}: {problems[0]}; the {report.agreeing:,} shared ids "
            f"agree, so set design.resize{'' if donor else ' with design.draft'}"
        )
    if donor:
        return report
    if "eos" in report.special and not resize:
        ours, theirs = report.special["eos"]
        raise FastDraftError(
            f"{where}: its EOS token is {theirs or 'missing'}, the target's {ours or 'missing'}; "
            "copy the target's tokenizer into its folder"
        )
    for problem in problems:
        logger.warning("%s: differs from the target: %s", where, problem)
    return report
