"""Short trainings that measure how much of the target each design learns.

A probe starts from the initialization the draft will start from and trains on the same rows in the
same order, for the same number of tokens, with the real trainer. Its acceptance is expected
acceptance on rows that no probe reads (`fastdraft_hf.eval.expected`). A short training favours
designs that learn fast: use as many tokens as time allows.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastdraft_hf._atomic import atomic_folder, write_json
from fastdraft_hf._progress import Progress
from fastdraft_hf.data.sources import Source
from fastdraft_hf.draft.config import DesignConfig
from fastdraft_hf.eval.expected import expected_rounds
from fastdraft_hf.eval.metrics import block_efficiency
from fastdraft_hf.train.section import training_section
from fastdraft_hf.tune.config import TuneConfig
from fastdraft_hf.tune.grid import Design
from fastdraft_hf.tune.texts import (
    MAX_NEW_TOKENS,
    held_out,
    read_acceptance,
    sampled_completions,
)

if TYPE_CHECKING:
    from fastdraft_hf.target.resolve import Target

# Tokens of a sequence, sequences of a step, and held-out completions.
_SEQUENCE, _BATCH, _TEXTS = 512, 4, 24


class Probes:
    """Train every design briefly and measure it; finished ones are kept in ``probes.json``.

    Args:
        config: settings of the search.
        target: the model that generated the rows.
        folder: of the search.
        gammas: values of γ.

    Raises:
        FastDraftError: a folder of rows is not a finished set, or has nothing to measure on.
    """

    def __init__(self, config: TuneConfig, target: Target, folder: Path, gammas: list[int]) -> None:
        self._config, self._target, self._folder = config, target, folder
        self._gammas, self._sets = gammas, [Path(row) for row in config.rows]
        self._device = "cuda" if config.measure == "cuda" else "cpu"
        self._train = training_section()(
            sources=[Source(kind="generated", name=folder.name) for folder in self._sets],
            max_train_tokens=config.probe_tokens,
            max_length=_SEQUENCE,
            per_device_train_batch_size=_BATCH,
            eval_rows=0,
        )
        self._texts = sampled_completions(self._sets, _TEXTS, config.seed)
        # Whatever a probe depends on besides its design.
        facts: list[Any] = [config.init, config.probe_tokens, config.seed, gammas]
        facts += [str(target.path.resolve()), target.revision]
        facts += [(str(p), p.stat().st_size) for s in self._sets for p in sorted(s.iterdir())]
        self._key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:12]

    def __call__(self, designs: list[Design]) -> dict[str, dict[int, float]]:
        """Return design -> γ -> block efficiency."""
        path = self._folder / "probes.json"
        saved: dict[str, Any] = (
            json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        )
        found = {}
        with Progress("tune probes", len(designs), "drafts") as progress:
            for design in designs:
                label = f"{self._key}-{design.name}x{design.feed_forward}"
                if label not in saved:
                    draft = self._trained(design, self._folder / "probes" / label)
                    (texts,) = read_acceptance(
                        self._target.path, [draft], self._texts, self._device
                    )
                    saved[label] = {
                        str(gamma): block_efficiency(
                            [expected_rounds(text, gamma, MAX_NEW_TOKENS) for text in texts]
                        )
                        for gamma in self._gammas
                    }
                    write_json(path, saved)
                    shutil.rmtree(self._folder / "probes" / label, ignore_errors=True)
                found[design.name] = {int(gamma): value for gamma, value in saved[label].items()}
                progress.advance(1)
        return found

    def _trained(self, design: Design, work: Path) -> Path:
        """Train one design, resuming from its last checkpoint; return the draft's folder."""
        import datasets

        from fastdraft_hf.draft.build import build, save_draft
        from fastdraft_hf.target.resolve import load_tokenizer
        from fastdraft_hf.train.loop import train

        config, start = self._config, work / "start"
        if not start.exists():
            section = DesignConfig(**design.section(config))
            model, _ = build(self._target.path, section, config.seed)
            with atomic_folder(start) as temporary:
                save_draft(model, temporary)
        tokenizer = load_tokenizer(self._target.path)
        train(
            start,
            work / "work",
            self._train,
            train_dataset=datasets.load_from_disk(str(self._rows(tokenizer) / "train")),
            tokenizer=tokenizer,
            seed=config.seed,
            device=self._device,
            label=f"probe {design.name}",
        )
        return work / "work" / "model"

    def _rows(self, tokenizer: Any) -> Path:
        """Write the rows that all probes read, once, without held-out rows and evaluation text."""
        import datasets

        from fastdraft_hf.data.completions import open_completions
        from fastdraft_hf.data.decontaminate import Decontaminator

        folder = self._folder / "probes" / f"rows-{self._key}"
        if folder.exists():
            return folder
        decontaminator, parts = Decontaminator.of_task_sets(), []
        with atomic_folder(folder) as temporary:
            for number, (source, rows_folder) in enumerate(
                zip(self._train.sources, self._sets, strict=True)
            ):
                rows, _, _ = open_completions(
                    [source],
                    folder=temporary / f"rows-{number}",
                    generated=rows_folder.parent,
                    logits=None,
                    tokenizer=tokenizer,
                    decontaminator=decontaminator,
                    max_length=_SEQUENCE,
                    eval_rows=0,
                    seed=self._config.seed,
                    keep=lambda index: not held_out(index),
                )
                parts.append(rows)
            datasets.concatenate_datasets(parts).save_to_disk(str(temporary / "train"))
        return folder
