"""Whether two models may draft for one another: every id must mean the same token."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fastdraft_hf._errors import FastDraftError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_SPECIAL = ("bos", "eos", "pad", "unk")


@dataclass(frozen=True)
class Vocabulary:
    """What a model says about its ids.

    Attributes:
        name: of the model, for reports.
        ids: token -> id.
        special: role (bos, eos, pad, unk) -> token.
        ends: ids that end what the model says, of its generation config and config.
        rows: how many ids its head scores, when known; more than tokens where it is padded.
    """

    name: str
    ids: Mapping[str, int]
    special: Mapping[str, str | None]
    ends: frozenset[int] = frozenset()
    rows: int | None = None

    @classmethod
    def of_tokenizer(cls, tokenizer: PreTrainedTokenizerBase, name: str) -> Vocabulary:
        """Read a tokenizer; the end is its ``eos``, and the rows are not known."""
        special = {role: getattr(tokenizer, f"{role}_token", None) for role in _SPECIAL}
        end = tokenizer.eos_token_id
        return cls(
            name, tokenizer.get_vocab(), special, frozenset([] if end is None else [int(end)])
        )

    @classmethod
    def of_folder(
        cls, folder: Path, name: str | None = None, tokenizer: PreTrainedTokenizerBase | None = None
    ) -> Vocabulary:
        """Read a model's folder: tokenizer, config and generation config; no weights.

        Args:
            folder: of the model.
            name: for reports; by default the folder.
            tokenizer: the folder's own, where it is loaded already.

        Raises:
            FastDraftError: its tokenizer or its config cannot be read.
        """
        from transformers import AutoConfig, AutoTokenizer

        try:
            if tokenizer is None:
                what = "no tokenizer"
                # False, not the default: a model with code of its own would ask on the terminal.
                tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
            what, config = "no config", None
            if (folder / "config.json").is_file():
                config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        except (OSError, ValueError, ImportError) as error:
            reason = " ".join(str(error).split())[:200]
            raise FastDraftError(f"{folder}: {what} can be read there ({reason})") from error
        found = cls.of_tokenizer(tokenizer, name or str(folder))
        rows, ends = None, set(found.ends)
        if config is not None:
            text = config.get_text_config(decoder=True)
            rows = int(text.vocab_size)
            ends |= _end_ids(getattr(config, "eos_token_id", None))
            ends |= _end_ids(getattr(text, "eos_token_id", None))
        generation = folder / "generation_config.json"
        if generation.is_file():
            stored = json.loads(generation.read_text(encoding="utf-8"))
            ends |= _end_ids(stored.get("eos_token_id"))
        return cls(found.name, found.ids, found.special, frozenset(ends), rows)


def _end_ids(value: Any) -> set[int]:
    if value is None:
        return set()
    return {int(v) for v in value} if isinstance(value, (list, tuple)) else {int(value)}


Verdict = Literal["identical", "padded", "extended", "different"]


@dataclass(frozen=True)
class VocabularyReport:
    """Two vocabularies compared id by id.

    Attributes:
        target, draft: the two.
        agreeing: number of ids that mean the same token in both.
        differing: (id, token in the target, token in the draft) where both name a token and not
            the same, in the order of ids.
        only_target, only_draft: id -> token, of ids only one of them names.
        special: role -> (target's token, draft's token), where they are not the same.
        ends: (target's end ids, draft's), where they are not the same.
    """

    target: Vocabulary
    draft: Vocabulary
    agreeing: int
    differing: tuple[tuple[int, str, str], ...]
    only_target: Mapping[int, str]
    only_draft: Mapping[int, str]
    special: Mapping[str, tuple[str | None, str | None]]
    ends: tuple[frozenset[int], frozenset[int]] | None

    @property
    def verdict(self) -> Verdict:
        """What the two are to each other.

        ``identical``: the same token for every id, and the same rows. ``padded``: the same tokens,
        heads of different heights. ``extended``: they agree on every id that both name, and one or
        both name more. ``different``: some id means two tokens.
        """
        if self.differing or not self.agreeing:
            return "different"
        if self.only_target or self.only_draft:
            return "extended"
        return "padded" if self._rows_differ else "identical"

    @property
    def _rows_differ(self) -> bool:
        rows = (self.target.rows, self.draft.rows)
        return None not in rows and rows[0] != rows[1]

    def problems(self) -> list[str]:
        """Return what differs, a sentence each; empty when nothing does."""
        found = []
        named = (self.target, self.draft)
        if self.differing:
            shown = "; ".join(f"{i}: {a!r} and {b!r}" for i, a, b in self.differing[:3])
            number = len(self.differing)
            found.append(
                f"{number:,} ids mean different tokens ({shown})"
                if number > 1
                else f"one id means different tokens ({shown})"
            )
        for side, extra in zip(named, (self.only_target, self.only_draft), strict=True):
            if extra:
                shown = ", ".join(f"{i} {t!r}" for i, t in list(extra.items())[:4])
                dots = ", …" if len(extra) > 4 else ""
                ids = f"{len(extra):,} ids" if len(extra) > 1 else "one id"
                found.append(f"{ids} only {side.name} names ({shown}{dots})")
        if self._rows_differ:
            found.append(
                f"the heads score {self.target.rows:,} and {self.draft.rows:,} ids"
                + ("" if self.differing else ": padding, which can be resized")
            )
        for role, (ours, theirs) in self.special.items():
            found.append(f"{role}: {ours!r} and {theirs!r}")
        if self.ends is not None:
            ours_ids, theirs_ids = (_named_ends(v) for v in named)
            found.append(f"ends on {ours_ids} and on {theirs_ids}")
        return found

    def rows(self) -> list[dict[str, str]]:
        """Return the table a person reads, a dictionary a row."""

        def row(what: str, ours: Any, theirs: Any) -> dict[str, str]:
            shown = [f"{v:,}" if isinstance(v, int) else str(v) for v in (ours, theirs)]
            return {"": what, self.target.name: shown[0], f"{self.draft.name} ": shown[1]}

        table = [
            row("tokens", len(self.target.ids), len(self.draft.ids)),
            row("rows of the head", self.target.rows or "?", self.draft.rows or "?"),
            row("ids that agree", self.agreeing, self.agreeing),
            row("ids that differ", len(self.differing), len(self.differing)),
            row("ids the other lacks", len(self.only_target), len(self.only_draft)),
        ]
        for role in _SPECIAL:
            table.append(row(role, self.target.special.get(role), self.draft.special.get(role)))
        table.append(row("ends on", _named_ends(self.target), _named_ends(self.draft)))
        return table

    def conclusion(self) -> str:
        """Return one sentence: may the one draft for the other, and what to do."""
        return {
            "identical": "The same vocabulary: the one can draft for the other as it is.",
            "padded": "The same tokens, padded to different heights: design.resize evens them out.",
            "extended": "They agree on every id both name: design.resize gives the draft the "
            "target's rows and tokenizer.",
            "different": "Different vocabularies: the one cannot draft for the other. Its layers "
            "and embeddings can be taken with init: transplant.",
        }[self.verdict]


def _named_ends(vocabulary: Vocabulary) -> str:
    by_id = {i: t for t, i in vocabulary.ids.items() if i in vocabulary.ends}
    return ", ".join(f"{i} {by_id.get(i, '?')}" for i in sorted(vocabulary.ends)) or "nothing"


def compare_vocabularies(target: Vocabulary, draft: Vocabulary) -> VocabularyReport:
    """Compare two vocabularies id by id. Lengths say nothing: two of one length can differ."""
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
        {
            role: (target.special.get(role), draft.special.get(role))
            for role in _SPECIAL
            if target.special.get(role) != draft.special.get(role)
        },
        None if target.ends == draft.ends else (target.ends, draft.ends),
    )


def check_vocabulary(
    target: Vocabulary | Path,
    other: Vocabulary | Path,
    key: str | None = None,
    *,
    donor: bool = False,
    resize: bool = False,
) -> VocabularyReport:
    """Raise unless ``other`` can draft for ``target``; every stage that pairs two models asks here.

    Every id that both name must mean the same token, and neither may name one that the other does
    not, or score more of them (padding): ``resize`` allows both. The end token of the tokenizers
    must be the same, unless the draft is to get the target's tokenizer (``donor``, ``resize``).
    Whatever else differs (begin, padding and unknown tokens, further ids that end a turn) costs
    nothing but acceptance: it is logged as a warning for a draft and is nothing to a donor.

    Args:
        target, other: what `Vocabulary.of_folder` read, or folders to be read.
        key: the setting that named ``other``, for errors (``"design.donor"``).
        donor: only its weights are taken.
        resize: rows may be added or dropped where every shared id agrees.

    Raises:
        FastDraftError: saying what differs and what would help.
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
            "init: transplant takes a donor with another one"
            if donor
            else "a draft must have the target's own tokenizer"
        )
        raise FastDraftError(f"{where}: its vocabulary is not the target's: {problems[0]}; {way}")
    if report.verdict != "identical" and not resize:
        what = "has not the target's rows" if report.verdict == "padded" else "is not the target's"
        way = "set design.resize" if donor else "fastdraft design --draft FOLDER --resize"
        raise FastDraftError(
            f"{where}: its vocabulary {what}: {problems[0]}; they agree on the "
            f"{report.agreeing:,} ids that both name, so {way} can even them out"
        )
    if donor:
        return report
    if "eos" in report.special and not resize:
        ours, theirs = report.special["eos"]
        raise FastDraftError(
            f"{where}: it ends on {theirs or 'no token'}, the target on {ours or 'no token'}; copy "
            "the target's tokenizer into its folder"
        )
    for problem in problems:
        logger.warning("%s: not as the target's: %s", where, problem)
    return report
