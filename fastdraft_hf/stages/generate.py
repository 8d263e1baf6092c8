"""Stage generate: the target generates the completions that the draft learns from."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastdraft_hf._atomic import write_json
from fastdraft_hf._errors import FastDraftError
from fastdraft_hf._processes import on_main
from fastdraft_hf.data.config import GeneratedSet
from fastdraft_hf.data.dataset_card import write_dataset_card
from fastdraft_hf.data.decontaminate import Decontaminator
from fastdraft_hf.data.engines import Engine
from fastdraft_hf.data.filters import FILTERS, check_language, keep_instructions, write_filters
from fastdraft_hf.data.generations import Requests, write_rows
from fastdraft_hf.data.parts import iter_rows, stored_indices
from fastdraft_hf.data.passages import passage_instructions
from fastdraft_hf.data.prompt_sets import conversations
from fastdraft_hf.data.prompts import (
    Conversation,
    chat_ids,
    code_instructions,
    free_prefix,
    special_ids,
    template_ends,
)
from fastdraft_hf.stages.run import Run
from fastdraft_hf.stages.target_engine import open_target_engine

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

# A small target generates nonsense over its whole vocabulary.
INSTRUCTION_TOP_P = 0.95
# Which held-out text the prompts of a folder were checked against.
HELD_OUT = "held_out.json"
# Settings that a card lists even if they are the defaults.
_ALWAYS = {"kind", "rows", "max_new_tokens", "temperatures"}


def run(run: Run, folder: Path) -> dict[str, Any]:
    """Generate every set of the recipe, one folder each. All processes share the rows."""
    from transformers import AutoTokenizer

    config = run.recipe.generate
    assert config is not None  # the stage is planned only with its section
    if not config.sets:
        raise FastDraftError("generate.sets: at least one set is needed")
    # Before any work: a task set that cannot be read stops the run.
    decontaminator = Decontaminator.of_task_sets(run.recipe.evaluate.tasks, run.recipe.bench.tasks)
    on_main(lambda: _check_held_out(folder / HELD_OUT, decontaminator.held_out))
    tokenizer = AutoTokenizer.from_pretrained(run.target.path)
    sets = [
        _Set(run, folder, name, wanted, tokenizer, decontaminator)
        for name, wanted in config.sets.items()
    ]
    # A dataset that cannot be read stops the run before the model is loaded.
    for one in sets:
        one.prepare()
    engine = open_target_engine(run, tokenizer)
    return {
        "engine": engine.name,
        "sets": {one.name: one.generate(engine) for one in sets},
        "held_out": decontaminator.held_out,
    }


def unchanged(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Return what of a folder stays valid: sets that did not change or only get more rows.

    The first rows of a larger set are those of the smaller one. That does not hold for a set with
    ``max_minutes``: its rows depend on what was in flight when the time was up.
    """
    if {**old, "sets": None} != {**new, "sets": None}:
        return []

    def more_of(had: dict[str, Any], wanted: dict[str, Any] | None) -> bool:
        if wanted is None or {**had, "rows": None} != {**wanted, "rows": None}:
            return False
        grew: bool = wanted["rows"] > had["rows"] and wanted["max_minutes"] is None
        return grew or wanted["rows"] == had["rows"]

    same = [name for name, had in old["sets"].items() if more_of(had, new["sets"].get(name))]
    asked = [f"{name}-instructions" for name in same if old["sets"][name]["kind"] == "magpie"]
    return [*same, *asked, HELD_OUT] if same else []


def lacks_rows(folder: Path) -> bool:
    """Return whether a finished stage has fewer rows than were judged."""
    return any(
        json.loads(path.read_text(encoding="utf-8"))["rows"] > len(stored_indices(path.parent))
        for path in folder.glob(f"*/{FILTERS}")
    )


def _check_held_out(path: Path, held_out: dict[str, list[str]]) -> None:
    """Refuse to resume if other tasks were held out when the prompts were chosen.

    Rows are found again by their index, and which prompts there are depends on the tasks.
    """
    if not path.exists():
        write_json(path, held_out)
    elif json.loads(path.read_text(encoding="utf-8")) != held_out:
        raise FastDraftError(
            "generate: evaluate.tasks, bench.tasks or their text changed since the stage started. "
            f"Restore them, or delete {path.parent} to start again"
        )


@contextlib.contextmanager
def _at(key: str) -> Iterator[None]:
    """Put a key before the message of a `FastDraftError`."""
    try:
        yield
    except FastDraftError as error:
        raise FastDraftError(f"{key}{error}") from error


@dataclass
class _Set:
    """One set: finds its prompts, has the target answer them, and judges the rows."""

    run: Run
    folder: Path
    name: str
    wanted: GeneratedSet
    tokenizer: PreTrainedTokenizerBase
    decontaminator: Decontaminator
    prompts: list[tuple[int, ...]] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    def prepare(self) -> None:
        """Find the prompts, or check that the target can generate them."""
        wanted, tokenizer = self.wanted, self.tokenizer
        self.facts["kind"] = wanted.kind
        seed, counts = self.run.recipe.seed, Counter[str]()
        with _at(f"generate.sets.{self.name}."):
            if wanted.filters.language is not None:
                with _at("filters."):
                    check_language(wanted.filters.language)
            if wanted.system_prompt is not None:
                with _at("system_prompt: "):
                    chat_ids(tokenizer, "Hello", wanted.system_prompt)
            if wanted.kind == "free":
                self.prompts = [free_prefix(tokenizer)] * wanted.rows
            elif wanted.kind == "magpie":
                template_ends(tokenizer, wanted.system_prompt)
            elif wanted.kind == "dataset":
                self._choose(conversations(wanted, seed, counts), counts)
            else:
                texts = code_instructions if wanted.kind == "code" else passage_instructions
                self._choose(([("user", text)] for text in texts(seed)), counts)

    def _choose(self, chats: Iterable[Conversation], counts: Counter[str]) -> None:
        """Take the first ``rows`` conversations that are allowed and fit."""
        chosen: dict[tuple[int, ...], str] = {}
        for turns in chats:
            if self.decontaminator.overlaps("\n".join(content for _, content in turns)):
                counts["overlaps held-out text"] += 1
                continue
            try:
                ids = chat_ids(self.tokenizer, turns, self.wanted.system_prompt)
            except FastDraftError:
                counts["refused by the chat template"] += 1
                continue
            if len(ids) > self.wanted.max_prompt_tokens:
                counts["too long"] += 1
            elif ids in chosen:
                counts["duplicate"] += 1
            else:
                counts["kept"] += 1
                # Resume compares the text, not the ids: some templates contain today's date.
                chosen[ids] = json.dumps(list(turns))
            if counts["kept"] == self.wanted.rows:
                break
        self.facts["prompts"] = dict(counts)
        if not chosen:
            why = ", ".join(f"{reason}: {count}" for reason, count in counts.items())
            raise FastDraftError(f"kind: {self.wanted.kind} gives no usable prompt ({why})")
        self.prompts = list(chosen)
        self._check_prompts(list(chosen.values()))

    def _check_prompts(self, texts: Sequence[str]) -> None:
        """Refuse to resume with other prompts: rows are found again by their index."""
        path = self.folder / self.name / "prompts.json"

        def state(count: int) -> dict[str, Any]:
            sha256 = hashlib.sha256("\n".join(texts[:count]).encode()).hexdigest()
            return {"prompts": count, "sha256": sha256}

        def compare() -> dict[str, Any]:
            before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else state(0)
            if before != state(min(before["prompts"], len(texts))):
                raise FastDraftError(
                    "kind: the prompts are not those that the set started with. Restore them, "
                    f"or delete {path.parent} to start again"
                )
            write_json(path, state(len(texts)))
            return state(len(texts))

        if on_main(compare) != state(len(texts)):
            raise FastDraftError("kind: this process finds other prompts than the main process")

    def generate(self, engine: Engine) -> dict[str, Any]:
        """Generate the set and return its facts."""
        wanted, folder = self.wanted, self.folder / self.name
        if wanted.kind == "magpie":
            self._instructions(engine)
        self._write(
            engine,
            self.name,
            self.prompts,
            temperatures=wanted.temperatures,
            max_new_tokens=wanted.max_new_tokens,
            temperatures_per_prompt=wanted.temperatures_per_prompt,
            top_p=wanted.top_p,
        )

        def finish() -> dict[str, Any]:
            logger.info("filtering %s", self.name)
            counts = dict(write_filters(folder, wanted.filters, self.tokenizer.decode))
            rows, tokens = self._card(engine, folder, counts)
            return {"rows": rows, "completion_tokens": tokens, "filter": counts}

        self.facts |= on_main(finish)
        logger.info("%s: %s", self.name, self.facts)
        return self.facts

    def _write(
        self, engine: Engine, name: str, prompts: Sequence[tuple[int, ...]], **how: Any
    ) -> None:
        recipe = self.run.recipe
        assert recipe.generate is not None
        # Two sets must not sample the same stream from the same prompt.
        seed = recipe.seed * 97 + zlib.crc32(name.encode()) % 1_000_000
        requests = Requests(prompts, seed=seed, source=name, **how)
        write_rows(
            engine,
            requests,
            self.folder / name,
            rows_per_part=recipe.generate.rows_per_shard,
            max_minutes=self.wanted.max_minutes,
        )

    def _instructions(self, engine: Engine) -> None:
        """Have the target generate instructions, and keep the usable ones as prompts."""
        wanted, name = self.wanted, f"{self.name}-instructions"
        prefix, suffix = template_ends(self.tokenizer, wanted.system_prompt)
        self._write(
            engine,
            name,
            [prefix] * wanted.rows,
            temperatures=wanted.instruction_temperatures,
            max_new_tokens=wanted.max_instruction_tokens,
            top_p=INSTRUCTION_TOP_P,
        )
        kept, reasons = keep_instructions(
            iter_rows(self.folder / name),
            self.tokenizer.decode,
            self.decontaminator.overlaps,
            suffix=suffix,
            special_ids=special_ids(self.tokenizer),
            filters=wanted.filters,
        )
        if not wanted.system_prompt_in_answers:
            prefix, suffix = template_ends(self.tokenizer)
        self.prompts = [prefix + instruction + suffix for instruction in kept]
        self.facts["instructions"] = dict(reasons)
        with _at(f"generate.sets.{self.name}."):
            self._check_prompts([json.dumps(ids) for ids in kept])
        on_main(lambda: self._card(engine, self.folder / name, {}))

    def _card(self, engine: Engine, folder: Path, kept: dict[str, int]) -> tuple[int, int]:
        settings = self.wanted.model_dump(include=_ALWAYS)
        settings |= self.wanted.model_dump(exclude_defaults=True)
        local = Path(self.wanted.dataset or "").expanduser()
        if self.wanted.dataset and local.exists():  # cards are published: no private paths
            settings["dataset"] = local.name
        return write_dataset_card(
            folder,
            self.tokenizer.decode,
            target=self.run.target,
            engine=engine.name,
            settings=settings,
            prompts=self.facts.get("instructions", self.facts.get("prompts", {})),
            kept=kept,
            language=self.wanted.filters.language,
        )
