"""Stage generate: the target writes the text that the draft will learn from."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastdraft_hf._atomic import write_json
from fastdraft_hf._errors import FastDraftError
from fastdraft_hf._processes import this_process
from fastdraft_hf._progress import Progress
from fastdraft_hf.data.config import GeneratedSet
from fastdraft_hf.data.dataset_card import SetFacts, kept_first, write_dataset_card
from fastdraft_hf.data.decontaminate import Decontaminator
from fastdraft_hf.data.engines import Engine
from fastdraft_hf.data.filters import judge_rows, write_filters
from fastdraft_hf.data.generated import read_rows, write_rows
from fastdraft_hf.data.instructions import keep_instructions
from fastdraft_hf.data.languages import check_language
from fastdraft_hf.data.passages import passage_instructions
from fastdraft_hf.data.prompt_sets import PromptSet
from fastdraft_hf.data.prompts import (
    Conversation,
    Prompts,
    chat_ids,
    code_instructions,
    free_prefix,
    special_ids,
    template_ends,
)
from fastdraft_hf.data.requests import requests_for
from fastdraft_hf.stages.kept_sets import HELD_OUT
from fastdraft_hf.stages.runner import Run
from fastdraft_hf.stages.target_engine import open_target_engine

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_ABOUT = {
    "free": "Free text from the start of a document.",
    "magpie": "Instructions the target thought up (Magpie, arXiv 2406.08464), and its answers.",
    "code": "Functions of the Python standard library, completed by the target.",
    "passages": "Tasks about passages of documentation, done by the target.",
    "dataset": "The target's answers to the prompts of a dataset.",
}
# Settings of kinds that others do not read; a card leaves them out.
_ONLY = {
    "dataset": ("dataset", "name", "split", "column", "context_columns", "revision"),
    "magpie": (
        "max_instruction_tokens",
        "instruction_temperatures",
        "instruction_top_p",
        "system_prompt_in_answers",
    ),
}


def run(run: Run, folder: Path) -> dict[str, Any]:
    """Write every set of the recipe; one folder of parquet shards each."""
    from transformers import AutoTokenizer

    config = run.recipe.generate
    assert config is not None  # the stage is planned only with its section
    if not config.sets:
        raise FastDraftError("generate.sets: at least one set is needed")
    # First of all: a task set that cannot be read stops the run before any work.
    decontaminator = Decontaminator.of_task_sets(run.recipe.evaluate.tasks, run.recipe.bench.tasks)
    _check_begun(folder / HELD_OUT, decontaminator.held_out)
    tokenizer = AutoTokenizer.from_pretrained(run.target.path)
    writers = [
        _Writer(run, folder, name, wanted, tokenizer, decontaminator)
        for name, wanted in config.sets.items()
    ]
    # So does a dataset that cannot be read: prompts come before the model.
    for writer in writers:
        writer.prepare()
    engine = open_target_engine(run, tokenizer)
    facts: dict[str, Any] = {"engine": engine.name, "sets": {}, "held_out": decontaminator.held_out}
    for writer in writers:
        facts["sets"][writer.name] = writer.write(engine)
    return facts


def _check_begun(path: Path, held_out: dict[str, list[str]]) -> None:
    """Refuse to go on with prompts that were chosen when other tasks were left out.

    Rows are found again by their number, and which prompts there are depends on the tasks.
    """
    if not path.exists():
        write_json(path, held_out)
    elif json.loads(path.read_text(encoding="utf-8")) != held_out:
        raise FastDraftError(
            "generate: it was begun when evaluate.tasks and bench.tasks were others, or held other "
            f"text; take them again, or delete {path.parent} to start anew"
        )


@dataclasses.dataclass(frozen=True)
class _Chosen:
    """Prompts, told apart from others: how many, and their digest.

    Attributes:
        first: digest of as many of them as the set was begun with; ``None`` if there are fewer.
    """

    count: int
    sha256: str
    first: str | None


def _digest_of(instructions: Sequence[Sequence[int]]) -> str:
    return hashlib.sha256(json.dumps(instructions).encode()).hexdigest()


class _Writer:
    """Writes one set: finds its prompts, lets the target answer, says what is kept."""

    def __init__(
        self,
        run: Run,
        folder: Path,
        name: str,
        wanted: GeneratedSet,
        tokenizer: PreTrainedTokenizerBase,
        decontaminator: Decontaminator,
    ) -> None:
        assert run.recipe.generate is not None
        self.run, self.name, self.wanted, self.folder = run, name, wanted, folder
        self.tokenizer, self.decontaminator = tokenizer, decontaminator
        self.rows_per_shard = run.recipe.generate.rows_per_shard
        self.seed = run.recipe.seed
        self.facts: dict[str, Any] = {"kind": wanted.kind}
        self.prompts: Prompts = []
        # What the set was begun with; what was chosen now, where there was a choice.
        self.begun = self._read_begun()
        self.chosen: _Chosen | None = None

    def prepare(self) -> None:
        """Find the prompts, or check that the target can write them itself."""
        try:
            self._prepare()
        except FastDraftError as error:
            raise FastDraftError(f"generate.sets.{self.name}.{error}") from error
        if self.chosen is not None:
            self._check_same(self.chosen)

    def _prepare(self) -> None:
        kind, system_prompt = self.wanted.kind, self.wanted.system_prompt
        if self.wanted.filters.language is not None:
            try:
                check_language(self.wanted.filters.language)
            except FastDraftError as error:
                raise FastDraftError(f"filters.{error}") from error
        if system_prompt is not None:
            try:
                chat_ids(self.tokenizer, "Hello", system_prompt)
            except FastDraftError as error:
                raise FastDraftError(f"system_prompt: {error}") from error
        if kind == "free":
            self.prompts = [free_prefix(self.tokenizer)] * self.wanted.rows
        elif kind == "magpie":
            template_ends(self.tokenizer, system_prompt)
        elif kind in ("code", "passages"):
            asked = code_instructions if kind == "code" else passage_instructions
            self._choose(([("user", text)] for text in asked(self.seed)), Counter())
        else:
            assert self.wanted.dataset is not None  # checked by the settings
            prompt_set = PromptSet(
                self.wanted.dataset,
                self.wanted.name,
                self.wanted.split,
                self.wanted.column,
                self.wanted.revision,
                tuple(self.wanted.context_columns),
            )
            counts: Counter[str] = Counter()
            self._choose(prompt_set.conversations(self.seed, counts), counts)

    def _choose(self, conversations: Iterable[Conversation], counts: Counter[str]) -> None:
        """Take the first ``rows`` conversations that may and can be asked."""
        seen: set[tuple[int, ...]] = set()
        digest, first = hashlib.sha256(), None
        for turns in conversations:
            text = "\n".join(content for _, content in turns)
            if self.decontaminator.overlaps(text):
                counts["overlaps held-out text"] += 1
                continue
            try:
                ids = chat_ids(self.tokenizer, turns, self.wanted.system_prompt)
            except FastDraftError:
                counts["refused by the chat template"] += 1
                continue
            if len(ids) > self.wanted.max_prompt_tokens:
                counts["too long"] += 1
            elif ids in seen:
                counts["duplicate"] += 1
            else:
                counts["kept"] += 1
                seen.add(ids)
                self.prompts.append(ids)
                digest.update(json.dumps(list(turns)).encode())
                if self.begun is not None and counts["kept"] == self.begun["prompts"]:
                    first = digest.hexdigest()
            if counts["kept"] == self.wanted.rows:
                break
        self.facts["prompts"] = dict(counts)
        if not self.prompts:
            why = ", ".join(f"{reason}: {count}" for reason, count in counts.items())
            raise FastDraftError(
                f"kind: {self.wanted.kind} gives no prompt that can be asked ({why})"
            )
        self.chosen = _Chosen(len(self.prompts), digest.hexdigest(), first)

    def _read_begun(self) -> dict[str, Any] | None:
        path = self.folder / self.name / "prompts.json"
        if not path.exists():
            return None
        begun: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return begun

    def _check_same(self, chosen: _Chosen) -> None:
        """Refuse to go on with other prompts: rows are found again by their number.

        What is compared is the text, not the ids: some templates say today's date.
        """
        if self.begun is not None and self.begun["sha256"] != chosen.first:
            raise FastDraftError(
                f"generate.sets.{self.name}.kind: the set was begun with other prompts than there "
                f"are now; bring them back, or delete {self.folder / self.name} to start anew"
            )
        # The first alone: a late process must not make a folder again that is finished.
        if this_process().first and (self.begun is None or self.begun["prompts"] < chosen.count):
            write_json(
                self.folder / self.name / "prompts.json",
                {"prompts": chosen.count, "sha256": chosen.sha256},
            )

    def write(self, engine: Engine) -> dict[str, Any]:
        wanted = self.wanted
        if wanted.kind == "magpie":
            self._instructions(engine)
        rows = self._ask(
            engine,
            self.name,
            self.prompts,
            wanted.temperatures,
            wanted.max_new_tokens,
            temperatures_per_prompt=wanted.temperatures_per_prompt,
            samples=wanted.samples,
            top_p=wanted.top_p,
        )
        if not this_process().first:  # the first counts, for all
            return self.facts
        with Progress(f"filter {self.name}", len(rows), "rows") as progress:
            reasons = judge_rows(rows, wanted.filters, self.tokenizer.decode, progress.advance)
        write_filters(self.folder / self.name, rows, reasons, wanted.filters)
        counts = kept_first(Counter(reasons))
        self.facts["rows"] = len(rows)
        self.facts["completion_tokens"] = sum(len(r["completion_ids"]) for r in rows)
        self.facts["filter"] = counts
        self._card(engine, self.name, rows, _ABOUT[wanted.kind], counts)
        logger.info("%s: %s", self.name, self.facts)
        return self.facts

    def _ask(
        self,
        engine: Engine,
        name: str,
        prompts: Prompts,
        temperatures: Sequence[float],
        max_new_tokens: int,
        **how: Any,
    ) -> list[dict[str, Any]]:
        requests = requests_for(
            prompts,
            temperatures=temperatures,
            max_new_tokens=max_new_tokens,
            # Two sets must not draw the same stream from the same prompt.
            seed=self.seed * 97 + zlib.crc32(name.encode()) % 1_000_000,
            source=name,
            **how,
        )
        with Progress(f"generate {name}", len(requests), "rows") as progress:
            tokens = 0

            def on_progress(rows: int, new_tokens: int) -> None:
                nonlocal tokens
                tokens += new_tokens
                progress.advance(rows, note=f"{tokens:,} tokens")

            write_rows(
                engine,
                requests,
                self.folder / name,
                rows_per_shard=self.rows_per_shard,
                max_minutes=self.wanted.max_minutes,
                on_progress=on_progress,
                on_found=progress.found,
            )
        return read_rows(self.folder / name)

    def _instructions(self, engine: Engine) -> None:
        """Let the target write instructions, and keep the usable ones as prompts."""
        wanted, name = self.wanted, f"{self.name}-instructions"
        prefix, suffix = template_ends(self.tokenizer, wanted.system_prompt)
        rows = self._ask(
            engine,
            name,
            [prefix] * wanted.rows,
            wanted.instruction_temperatures,
            wanted.max_instruction_tokens,
            top_p=wanted.instruction_top_p,
        )
        kept, reasons = keep_instructions(
            rows,
            self.tokenizer.decode,
            self.decontaminator.overlaps,
            suffix=suffix,
            special_ids=special_ids(self.tokenizer),
            language=wanted.filters.language,
            near_duplicates=wanted.filters.near_duplicates,
        )
        if not wanted.system_prompt_in_answers:
            prefix, suffix = template_ends(self.tokenizer)
        whole = [prefix + instruction + suffix for instruction in kept]
        self.prompts = [ids for ids in whole if len(ids) <= wanted.max_prompt_tokens]
        if len(self.prompts) < len(whole):
            reasons["too long"] = len(whole) - len(self.prompts)
            reasons["kept"] = len(self.prompts)
        self.facts["instructions"] = kept_first(reasons)
        begun = 0 if self.begun is None else self.begun["prompts"]
        first = _digest_of(kept[:begun]) if begun <= len(kept) else None
        self._check_same(_Chosen(len(kept), _digest_of(kept), first))
        about = "Instructions that the target wrote in the user's place (Magpie, arXiv 2406.08464)."
        if this_process().first:
            self._card(engine, name, rows, about, {})

    def _card(
        self,
        engine: Engine,
        name: str,
        rows: Sequence[dict[str, Any]],
        about: str,
        kept: dict[str, int],
    ) -> None:
        left_out = [key for kind, keys in _ONLY.items() if kind != self.wanted.kind for key in keys]
        settings = {
            key: value
            for key, value in self.wanted.model_dump().items()
            if key not in left_out and value not in (None, [])
        }
        local = Path(self.wanted.dataset or "").expanduser()
        if self.wanted.dataset and local.exists():  # cards are published: no folders of one's own
            settings["dataset"] = local.name
        target = self.run.target
        write_dataset_card(
            self.folder / name,
            rows,
            SetFacts(
                name=name,
                about=about,
                target=target.name,
                revision=target.revision,
                engine=engine.name,
                license=target.license,
                settings=settings,
                prompts=self.facts.get("instructions", self.facts.get("prompts", {})),
                kept=kept,
                language=self.wanted.filters.language,
            ),
            self.tokenizer.decode,
        )
