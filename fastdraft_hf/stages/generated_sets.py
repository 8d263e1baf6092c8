"""The sets of stage generate: where their prompts come from, and how their rows are made."""

import contextlib
import hashlib
import json
import logging
import math
import random
import time
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from fastdraft_hf._atomic import read_json, write_json
from fastdraft_hf._errors import FastDraftError
from fastdraft_hf._processes import on_main
from fastdraft_hf.data.config import GeneratedSet
from fastdraft_hf.data.dataset_card import write_dataset_card
from fastdraft_hf.data.engines import Engine
from fastdraft_hf.data.filters import KEPT, keep_instructions, write_filters
from fastdraft_hf.data.installed import passage_instructions
from fastdraft_hf.data.parts import build_requests, iter_rows, stored_indices, write_rows
from fastdraft_hf.data.prompts import (
    Conversation,
    Prompts,
    chat_ids,
    code_instructions,
    conversations,
    free_prefix,
    special_ids,
    template_ends,
)
from fastdraft_hf.data.task_sets import Decontaminator
from fastdraft_hf.data.traffic import Answers, LoggedAnswers, read_traffic
from fastdraft_hf.stages import deadline
from fastdraft_hf.stages.run import Run
from fastdraft_hf.target.resolve import stop_ids

logger = logging.getLogger(__name__)

# A small target generates nonsense over its whole vocabulary.
INSTRUCTION_TOP_P = 0.95
# How many instructions a set's length limit is learned from, and their own limit, in tokens.
FIRST_INSTRUCTIONS, LONGEST_INSTRUCTION = 16, 256
# Settings that a card lists even if they are the defaults.
_ALWAYS = {"kind", "rows", "max_new_tokens", "temperatures"}


@contextlib.contextmanager
def _at(key: str) -> Iterator[None]:
    """Put a key before the message of a `FastDraftError`."""
    try:
        yield
    except FastDraftError as error:
        raise FastDraftError(f"{key}{error}") from error


@dataclass
class TextSet:
    """One set: finds its prompts, has the target answer them, and judges the rows."""

    run: Run
    folder: Path
    wanted: GeneratedSet
    tokenizer: PreTrainedTokenizerBase
    decontaminator: Decontaminator
    prompts: Prompts = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    cut: list[str] = field(default_factory=list)

    def prepare(self) -> None:
        """Find the prompts, or check that the target can generate them."""
        with _at(f"generate.sets.{self.folder.name}."):
            if self.wanted.system_prompt is not None:
                with _at("system_prompt: "):
                    chat_ids(self.tokenizer, "Hello", self.wanted.system_prompt)
            counts = self.find()
        self.facts = {"prompts": counts} if counts else {}

    def find(self) -> dict[str, int]:
        """Find `prompts`, and return how many were found, kept and left out, by reason."""
        self.prompts = [free_prefix(self.tokenizer)] * self.wanted.rows
        return {}

    def generate(self, engine: Engine | None) -> dict[str, Any]:
        """Generate the set and return its facts."""
        assert engine is not None
        wanted, name = self.wanted, self.folder.name
        self._write(
            engine,
            name,
            self.folder,
            self.prompts,
            temperatures=wanted.temperatures,
            max_new_tokens=wanted.max_new_tokens,
            temperatures_per_prompt=wanted.temperatures_per_prompt,
            top_p=wanted.top_p,
        )

        def finish() -> dict[str, Any]:
            logger.info("filtering %s", name)
            counts = {"filter": dict(write_filters(self.folder, wanted.near_duplicates))}
            settings = wanted.model_dump(include=_ALWAYS) | wanted.model_dump(exclude_defaults=True)
            local = Path(wanted.dataset or "").expanduser()
            if wanted.dataset and local.exists():  # cards are published: no private paths
                settings["dataset"] = local.name
            return counts | write_dataset_card(
                self.folder,
                target=self.run.target,
                engine=engine.name,
                settings=settings,
                counts=self.facts | counts,
            )

        self.facts |= on_main(finish)
        logger.info("%s: %s", name, self.facts)
        return self.facts

    def _write(
        self, engine: Engine, source: str, folder: Path, prompts: Prompts, **how: Any
    ) -> None:
        # Two sets must not sample the same stream from the same prompt.
        seed = self.run.recipe.seed * 97 + zlib.crc32(source.encode()) % 1_000_000
        requests = build_requests(prompts, seed=seed, source=source, **how)
        limit = on_main(lambda: deadline.minutes(self.run, f"generate.{source}"))
        start = time.monotonic()
        tokens = write_rows(engine, requests, folder, max_minutes=limit)
        took = (time.monotonic() - start) / 60
        on_main(lambda: deadline.note_rates(self.run, written=tokens, minutes=took))
        found = on_main(lambda: len(stored_indices(folder)))
        if found < len(requests):
            self.cut.append(f"{source}: {found:,} of {len(requests):,} rows")

    def _check_prompts(self, texts: Sequence[str]) -> None:
        """Refuse to resume with other prompts: rows are found again by their index."""
        path = self.folder / "prompts.json"

        def state(count: int) -> dict[str, Any]:
            sha256 = hashlib.sha256("\n".join(texts[:count]).encode()).hexdigest()
            return {"prompts": count, "sha256": sha256}

        if path.exists():
            before = read_json(path)
            if before != state(before["prompts"]):
                raise FastDraftError(
                    "kind: the prompts are not those that the set started with. Its dataset, "
                    "evaluate.tasks, bench.tasks or the installed packages changed. Restore them, "
                    f"or delete {path.parent} to start again"
                )
        write_json(path, state(len(texts)))


class ChatSet(TextSet):
    """Answers to instructions that are there already."""

    def find(self) -> dict[str, int]:
        self.prompts, counts = on_main(self._read)
        return counts

    def _read(self) -> tuple[Prompts, dict[str, int]]:
        wanted, seed, counts = self.wanted, self.run.recipe.seed, Counter[str]()
        chats: Iterable[Conversation]
        if wanted.kind == "dataset":
            chats = conversations(wanted, seed, counts)
        else:
            texts = code_instructions if wanted.kind == "code" else passage_instructions
            chats = ([("user", text)] for text in texts(seed))
        chosen = self._choose(chats, counts)
        if not chosen:
            why = ", ".join(f"{reason}: {count}" for reason, count in counts.items())
            raise FastDraftError(f"kind: {wanted.kind} gives no usable prompt ({why})")
        # Resume compares the text, not the ids: some templates contain today's date.
        self._check_prompts(list(chosen.values()))
        return list(chosen), dict(counts)

    def _choose(
        self, chats: Iterable[Conversation], counts: Counter[str]
    ) -> dict[tuple[int, ...], str]:
        """Return the first ``rows`` conversations that are allowed and fit, as ids and text."""
        chosen: dict[tuple[int, ...], str] = {}
        for turns in chats:
            if self.decontaminator.overlaps("\n".join(content for _, content in turns)):
                counts["overlaps held-out text"] += 1
                continue
            try:
                ids = chat_ids(self.tokenizer, turns, self.wanted.system_prompt)
            except FastDraftError as error:
                if isinstance(error.__cause__, ValueError):  # no template is the default
                    raise
                counts["refused by the chat template"] += 1
                continue
            if len(ids) > self.wanted.max_prompt_tokens:
                counts["too long"] += 1
            elif ids in chosen:
                counts["duplicate"] += 1
            else:
                counts[KEPT] += 1
                chosen[ids] = json.dumps(list(turns))
            if len(chosen) == self.wanted.rows:
                break
        return chosen


class MagpieSet(TextSet):
    """Answers to instructions that the target generates."""

    def find(self) -> dict[str, int]:
        template_ends(self.tokenizer, self.wanted.system_prompt)
        return {}

    def generate(self, engine: Engine | None) -> dict[str, Any]:
        assert engine is not None
        self._generate_instructions(engine)
        if deadline.planned(self.run)[f"generate.{self.folder.name}"] is not None:
            # A slow target ends few instructions in time; more answers use what is left of it.
            self.prompts = again(self.prompts, self.wanted.rows, self.run.recipe.seed)
        return super().generate(engine)

    def _generate_instructions(self, engine: Engine) -> None:
        """Have the target generate instructions, and keep the usable ones as prompts."""
        wanted, name, folder = self.wanted, self.folder.name, self.folder / "instructions"
        prefix, suffix = template_ends(self.tokenizer, wanted.system_prompt)
        source, prompts = f"{name}-instructions", [prefix] * wanted.rows
        how = {"temperatures": wanted.instruction_temperatures, "top_p": INSTRUCTION_TOP_P}
        limit = wanted.max_instruction_tokens
        if limit is None:
            first, longest = prompts[:FIRST_INSTRUCTIONS], LONGEST_INSTRUCTION
            self._write(engine, source, folder, first, max_new_tokens=longest, **how)
            limit = on_main(lambda: instruction_limit(folder))
            logger.info("%s: instructions of up to %d tokens", source, limit)
        self._write(engine, source, folder, prompts, max_new_tokens=limit, **how)

        def judge() -> tuple[Prompts, dict[str, int]]:
            kept, reasons = keep_instructions(
                iter_rows(folder),
                self.tokenizer.decode,
                self.decontaminator.overlaps,
                suffix=suffix,
                special_ids=special_ids(self.tokenizer),
                near_duplicates=wanted.near_duplicates,
            )
            with _at(f"generate.sets.{name}."):
                self._check_prompts([json.dumps(ids) for ids in kept])
            # The target wrote those that are not answered too, so training can read all of them.
            write_filters(folder, wanted.near_duplicates)
            return kept, dict(reasons)

        kept, self.facts["instructions"] = on_main(judge)
        counts = self.facts["instructions"]
        if len(kept) < sum(counts.values()) / 2:
            logger.warning("%s: more than half of the instructions are left out: %s", name, counts)
        start, end = prefix, suffix
        if not wanted.system_prompt_in_answers:
            start, end = template_ends(self.tokenizer)
        self.prompts = [start + instruction + end for instruction in kept]


def again(prompts: Prompts, rows: int, seed: int) -> Prompts:
    """Return ``rows`` prompts: all of them, then all in another order, and so on.

    Temperatures go round in turn, so another order gives a prompt another one.
    """
    rng, found, lap = random.Random(seed), list(prompts), list(prompts)
    while lap and len(found) < rows:
        rng.shuffle(lap)
        found += lap
    return found[:rows]


def instruction_limit(folder: Path) -> int:
    """Return the length limit of a set's instructions, learned from its first ones.

    Nine in ten of those that the target ended fit, with a quarter more for those it had not seen.
    A limit that is too high costs the time of texts that never end, one that is too low the texts.
    """
    first = np.arange(FIRST_INSTRUCTIONS)
    rows = list(iter_rows(folder, ["completion_ids", "finish_reason"], only=first))
    ended = [len(r["completion_ids"]) for r in rows if r["finish_reason"] != "length"]
    if len(ended) < len(rows) / 2 or not ended:
        return LONGEST_INSTRUCTION
    return min(LONGEST_INSTRUCTION, max(32, math.ceil(1.25 * np.quantile(ended, 0.9))))


class TrafficSet(TextSet):
    """What the target answered in a log; nothing is generated."""

    def find(self) -> dict[str, int]:
        self._answers, counts = on_main(self._read_log)
        self.prompts = list(self._answers)
        return counts

    def generate(self, engine: Engine | None) -> dict[str, Any]:
        # One answer a prompt, at a temperature that nobody knows.
        self.wanted = self.wanted.model_copy(
            update={"temperatures": [1.0], "temperatures_per_prompt": "one"}
        )
        ends = stop_ids(self.run.target.path, self.tokenizer)
        return super().generate(LoggedAnswers(self._answers, ends))

    def _read_log(self) -> tuple[Answers, dict[str, int]]:
        """Return the target's answers in a log by the ids of their prompts."""
        wanted, counts, found = self.wanted, Counter[str](), Answers()
        logged = read_traffic(
            str(wanted.dataset),
            False,
            counts,
            model=wanted.model,
            drop_patterns=wanted.drop_patterns,
        )
        for one in logged:
            if self.decontaminator.overlaps(one.text):
                counts["overlaps held-out text"] += 1
                continue
            try:
                prompt, answer = one.ids(self.tokenizer)
            except FastDraftError:
                counts["refused by the chat template"] += 1
                continue
            reason = "too long" if len(prompt) > wanted.max_prompt_tokens else KEPT
            counts["duplicate" if prompt in found else reason] += 1
            if reason == KEPT:
                found.setdefault(prompt, (answer, one.ended))
            if len(found) == wanted.rows:
                break
        if not found:
            why = ", ".join(f"{reason}: {count}" for reason, count in counts.items())
            raise FastDraftError(f"dataset: no usable answer in {wanted.dataset} ({why})")
        self._check_prompts([json.dumps([prompt, *found[prompt]]) for prompt in found])
        return found, dict(counts)


# By the kind of a set.
KINDS: dict[str, type[TextSet]] = {
    "free": TextSet,
    **dict.fromkeys(("code", "passages", "dataset"), ChatSet),
    "magpie": MagpieSet,
    "traffic": TrafficSet,
}
