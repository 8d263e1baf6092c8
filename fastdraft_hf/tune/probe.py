"""Short trainings that measure how much of the target each design learns.

A probe starts from the initialization the draft will start from and trains on the same rows in the
same order, for the same number of tokens, with the real trainer. Its acceptance is expected
acceptance on rows that no probe reads (`fastdraft_hf.eval.expected`). A short training favors
designs that learn fast: use as many tokens as time allows.
"""

import hashlib
import json
import random
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from fastdraft_hf._atomic import read_json, write_json
from fastdraft_hf._errors import FastDraftError
from fastdraft_hf._progress import Progress
from fastdraft_hf.data.corpus import open_completions
from fastdraft_hf.data.filters import iter_kept_rows
from fastdraft_hf.data.sources import Source
from fastdraft_hf.data.task_sets import Decontaminator
from fastdraft_hf.draft.build import build, save_draft
from fastdraft_hf.draft.config import DesignConfig
from fastdraft_hf.eval.expected import Continuation, expected_rounds, text_acceptance
from fastdraft_hf.eval.metrics import block_efficiency
from fastdraft_hf.target.resolve import Target, load_tokenizer, stop_ids
from fastdraft_hf.train.loop import train
from fastdraft_hf.train.section import training_section
from fastdraft_hf.tune.config import TuneConfig

# Tokens of a sequence, sequences of a step.
_SEQUENCE, _BATCH = 512, 4
# Held-out completions: their number, the tokens read of each, and the longest prompt before it.
_TEXTS, _MAX_NEW_TOKENS, _LONGEST_PROMPT = 24, 128, 512


def held_out(index: int) -> bool:
    """Return whether no probe trains on the row of this index: one row in five."""
    return index % 5 == 0


def sampled_completions(sets: Sequence[Path], count: int) -> list[tuple[Continuation, float]]:
    """Return up to ``count`` held-out completions and their temperatures, in random order.

    Greedy ones are left out: at temperature 0 there is no distribution to compare.

    Raises:
        FastDraftError: there is none, or a folder is not a finished set.
    """
    found = []
    for folder in sets:
        for row in iter_kept_rows(folder):
            short = len(row["prompt_ids"]) <= _LONGEST_PROMPT
            if held_out(row["index"]) and row["temperature"] > 0 and short:
                ids = tuple(row["completion_ids"][:_MAX_NEW_TOKENS])
                text = Continuation(folder.name, tuple(row["prompt_ids"]), ids)
                found.append((text, round(float(row["temperature"]), 4)))
    if not found:
        raise FastDraftError(
            f"rows: {', '.join(map(str, sets))}: no held-out completion was sampled at a "
            "temperature above 0"
        )
    return random.Random(0).sample(found, min(count, len(found)))


class Probes:
    """Train every design briefly and measure it; finished ones are kept in ``probes/``.

    Args:
        config: settings of the search.
        target: the model that generated the rows.
        folder: of the search.
        gammas: values of γ.

    Raises:
        FastDraftError: a folder of rows is not a finished set, or has nothing to measure on.
    """

    def __init__(self, config: TuneConfig, target: Target, folder: Path, gammas: list[int]) -> None:
        self._config, self._target, self._folder = config, target.path, folder / "probes"
        self._gammas, self._sets = gammas, [Path(row).resolve() for row in config.rows]
        self._device = "cuda" if config.measure == "cuda" else "cpu"
        self._texts = sampled_completions(self._sets, _TEXTS)
        # Whatever a probe depends on besides its design.
        facts: list[Any] = [config.init, config.probe_tokens, gammas, str(target.path.resolve())]
        facts += [(str(p), p.stat().st_size) for s in self._sets for p in sorted(s.iterdir())]
        self._key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:12]

    def __call__(self, designs: Mapping[str, DesignConfig]) -> dict[str, dict[int, float]]:
        """Return design -> γ -> block efficiency."""
        found = {}
        with Progress("tune probes", len(designs), "drafts") as progress:
            for name, design in designs.items():
                work = self._folder / f"{self._key}-{name}"
                result = work.with_suffix(".json")
                if not result.exists():
                    self._train(design, work)
                    write_json(result, self._measured(work / "work" / "model"))
                    shutil.rmtree(work)
                found[name] = {int(gamma): value for gamma, value in read_json(result).items()}
                progress.advance(1)
        return found

    def _train(self, design: DesignConfig, work: Path) -> None:
        """Train one design, resuming from its last checkpoint."""
        section = training_section()(
            sources=[Source(kind="generated", name=str(folder)) for folder in self._sets],
            max_train_tokens=self._config.probe_tokens,
            max_length=_SEQUENCE,
            per_device_train_batch_size=_BATCH,
            eval_rows=0,
        )
        tokenizer = load_tokenizer(self._target)
        corpus = open_completions(
            section.sources,
            folder=self._folder / f"rows-{self._key}",
            generated=Path(),  # the sources are absolute paths
            logits=None,
            tokenizer=tokenizer,
            decontaminator=Decontaminator.of_task_sets(),
            max_length=_SEQUENCE,
            eval_rows=0,
            seed=0,
            keep=lambda index: not held_out(index),
        )
        save_draft(build(self._target, design, 0)[0], work / "start")
        train(
            work / "start",
            work / "work",
            section,
            train_dataset=corpus.train,
            tokenizer=tokenizer,
            seed=0,
            device=self._device,
            label=f"probe {work.name.partition('-')[2]}",
        )

    def _measured(self, folder: Path) -> dict[str, float]:
        """Return γ -> block efficiency of a draft; both models read the texts in float32."""
        target, draft = (
            AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, trust_remote_code=False)
            .to(self._device)
            .eval()
            for path in (self._target, folder)
        )
        ends = stop_ids(self._target, load_tokenizer(self._target))
        found = [text_acceptance(target, draft, *text, ends) for text in self._texts]
        return {
            str(gamma): block_efficiency(
                [expected_rounds(text, gamma, _MAX_NEW_TOKENS) for text in found]
            )
            for gamma in self._gammas
        }
