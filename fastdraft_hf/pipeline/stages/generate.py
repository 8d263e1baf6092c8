"""Stage generate: the target writes the text that the draft will learn from."""

from __future__ import annotations

import json
import logging
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastdraft_hf._atomic import write_json
from fastdraft_hf._errors import FastDraftError
from fastdraft_hf._processes import this_process
from fastdraft_hf._progress import Progress
from fastdraft_hf.data.config import GeneratedSet
from fastdraft_hf.data.decontaminate import Decontaminator
from fastdraft_hf.data.engines import Engine
from fastdraft_hf.data.filters import keep_instructions, keep_rows
from fastdraft_hf.data.generated import read_rows, write_rows
from fastdraft_hf.data.prompts import (
    answer_suffix,
    chat_ids,
    code_instructions,
    free_prefix,
    magpie_prefix,
)
from fastdraft_hf.data.requests import Request, requests_for
from fastdraft_hf.pipeline.run import Run
from fastdraft_hf.pipeline.target_engine import open_target_engine

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

Prompts = list[tuple[int, ...]]


def run(run: Run, folder: Path) -> dict[str, Any]:
    """Write every set of the recipe; one folder of parquet shards each."""
    from transformers import AutoTokenizer

    config = run.recipe.generate
    assert config is not None  # the stage is planned only with its section
    if not config.sets:
        raise FastDraftError("generate.sets: at least one set is needed")
    # First of all: a task set that cannot be read stops the run before any work.
    decontaminator = Decontaminator.of_task_sets(run.recipe.evaluate.tasks, run.recipe.bench.tasks)
    _check_begun(folder / "held_out.json", decontaminator.held_out)
    path = run.target.path
    tokenizer = AutoTokenizer.from_pretrained(path)
    engine = open_target_engine(run, tokenizer)
    facts: dict[str, Any] = {"engine": engine.name, "sets": {}, "held_out": decontaminator.held_out}
    for set_name, wanted in config.sets.items():
        writer = _Writer(run, folder, set_name, wanted, engine, tokenizer, decontaminator)
        facts["sets"][set_name] = writer.write()
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


class _Writer:
    """Writes one set: finds its prompts, lets the target answer, counts what is kept."""

    def __init__(
        self,
        run: Run,
        folder: Path,
        name: str,
        wanted: GeneratedSet,
        engine: Engine,
        tokenizer: PreTrainedTokenizerBase,
        decontaminator: Decontaminator,
    ) -> None:
        assert run.recipe.generate is not None
        self.name, self.wanted, self.folder = name, wanted, folder
        self.engine, self.tokenizer, self.decontaminator = engine, tokenizer, decontaminator
        self.rows_per_shard = run.recipe.generate.rows_per_shard
        self.seed = run.recipe.seed
        self.facts: dict[str, Any] = {"kind": wanted.kind}

    def write(self) -> dict[str, Any]:
        prompts = {"free": self._free, "magpie": self._magpie, "code": self._code}[
            self.wanted.kind
        ]()
        temperatures = self.wanted.temperatures
        self._ask(self.name, prompts, temperatures, self.wanted.max_new_tokens)
        if not this_process().first:  # the first counts, for all
            return self.facts
        rows = read_rows(self.folder / self.name)
        _, reasons = keep_rows(rows)
        self.facts["rows"] = len(rows)
        self.facts["completion_tokens"] = sum(len(r["completion_ids"]) for r in rows)
        self.facts["filter"] = dict(reasons)
        logger.info("%s: %s", self.name, self.facts)
        return self.facts

    def _ask(
        self, name: str, prompts: Prompts, temperatures: Sequence[float], max_new_tokens: int
    ) -> None:
        requests: list[Request] = requests_for(
            prompts,
            temperatures=temperatures,
            max_new_tokens=max_new_tokens,
            # Two sets must not draw the same stream from the same prompt.
            seed=self.seed * 97 + zlib.crc32(name.encode()) % 1_000_000,
            source=name,
        )
        with Progress(f"generate {name}", len(requests), "rows") as progress:
            tokens = 0

            def on_progress(rows: int, new_tokens: int) -> None:
                nonlocal tokens
                tokens += new_tokens
                progress.advance(rows, note=f"{tokens:,} tokens")

            write_rows(
                self.engine,
                requests,
                self.folder / name,
                rows_per_shard=self.rows_per_shard,
                max_minutes=self.wanted.max_minutes,
                on_progress=on_progress,
            )

    def _free(self) -> Prompts:
        return [free_prefix(self.tokenizer)] * self.wanted.rows

    def _magpie(self) -> Prompts:
        """Let the target write instructions first, and keep the usable ones."""
        name = f"{self.name}-instructions"
        prefix, suffix = magpie_prefix(self.tokenizer), answer_suffix(self.tokenizer)
        # Instructions are varied only when they are sampled freely.
        self._ask(name, [prefix] * self.wanted.rows, [1.0], self.wanted.max_instruction_tokens)
        kept, reasons = keep_instructions(
            read_rows(self.folder / name), self.tokenizer.decode, self.decontaminator.overlaps
        )
        self.facts["instructions"] = dict(reasons)
        return [prefix + instruction + suffix for instruction in kept]

    def _code(self) -> Prompts:
        instructions = code_instructions(self.seed)
        clean = [text for text in instructions if not self.decontaminator.overlaps(text)]
        self.facts["instructions"] = {
            "available": len(clean),
            "overlaps held-out text": len(instructions) - len(clean),
        }
        return [chat_ids(self.tokenizer, text) for text in clean[: self.wanted.rows]]
