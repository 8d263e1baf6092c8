"""Short trainings that say how much of the target each design learns.

A probe starts from the initialization the draft will start from, reads the same rows the target
wrote in the same order, for the same number of tokens, with the real trainer; its acceptance is
expected acceptance on rows that no probe reads (`fastdraft_hf.eval.expected`). A short
training ranks designs by how fast they learn, which favours what learns fast: take as many tokens
as time allows.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastdraft_hf._atomic import atomic_folder, write_json
from fastdraft_hf._errors import FastDraftError
from fastdraft_hf._progress import Progress
from fastdraft_hf.data.shards import MANIFEST
from fastdraft_hf.data.sources import Source
from fastdraft_hf.draft.config import DesignConfig
from fastdraft_hf.eval.expected import expected_rounds, rounds_block_efficiency
from fastdraft_hf.train.config import TrainConfig
from fastdraft_hf.tune.config import TuneConfig
from fastdraft_hf.tune.grid import Design, draft_config
from fastdraft_hf.tune.predict import Acceptance
from fastdraft_hf.tune.texts import MAX_NEW_TOKENS, Reader, held_out, texts_of

if TYPE_CHECKING:
    from fastdraft_hf.target.resolve import Target

logger = logging.getLogger(__name__)

_SEQUENCE, _BATCH = 512, 4


class Probes:
    """Trains every design shortly and measures it; finished ones are kept in ``probes.json``.

    Args:
        config: of the search.
        target: who wrote the rows.
        folder: of the search.
        gammas: γ that block efficiencies are wanted for.

    Raises:
        FastDraftError: a folder of rows is no finished set, or holds no text to measure on.
    """

    def __init__(self, config: TuneConfig, target: Target, folder: Path, gammas: list[int]) -> None:
        assert config.probe_tokens is not None
        self._config, self._target, self._folder = config, target, folder
        self._gammas = gammas
        self._sets = [Path(row) for row in config.rows]
        for place in self._sets:
            if not (place / MANIFEST).is_file():
                raise FastDraftError(f"rows: {place} is no finished set of generated text")
        if config.probe_tokens < _SEQUENCE * _BATCH:
            raise FastDraftError(
                f"probe_tokens: {config.probe_tokens:,} is below one step of "
                f"{_SEQUENCE * _BATCH:,} tokens"
            )
        self._train = TrainConfig(
            sources=[Source(kind="generated", name=place.name) for place in self._sets],
            max_train_tokens=config.probe_tokens,
            max_length=_SEQUENCE,
            per_device_train_batch_size=_BATCH,
            eval_sequences=0,
            save_steps=50,
        )

    def __call__(self, designs: list[Design]) -> Mapping[str, Acceptance]:
        """Return the acceptance of every design."""
        path = self._folder / "probes.json"
        saved: dict[str, Any] = (
            json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        )
        texts = texts_of(self._sets, self._config.probe_texts, self._config.seed)
        reader: Reader | None = None
        found = {}
        with Progress("tune probes", len(designs), "drafts") as progress:
            for design in designs:
                label = self._label(design)
                if label not in saved:
                    draft = self._trained(design, label)
                    reader = reader or Reader(self._target.path, texts, self._device)
                    readings = reader.read(draft)
                    saved[label] = {
                        str(gamma): rounds_block_efficiency(
                            [expected_rounds(r, gamma, MAX_NEW_TOKENS) for r in readings]
                        )
                        for gamma in self._gammas
                    }
                    write_json(path, saved)
                    shutil.rmtree(self._folder / "probes" / label, ignore_errors=True)
                found[design.name] = Acceptance.of_efficiencies(
                    {gamma: saved[label][str(gamma)] for gamma in self._gammas}
                )
                progress.advance(1, f"{design.name}: α {found[design.name].alpha:.3f}")
        return found

    @property
    def _device(self) -> str:
        return "cuda" if self._config.measure == "cuda" else "cpu"

    def _label(self, design: Design) -> str:
        config = self._config
        return (
            f"{design.name}x{design.feed_forward}-{config.init}-{config.probe_tokens}-"
            f"{self._rows_key()}-{config.probe_texts}-{config.seed}-{max(self._gammas)}"
        )

    def _rows_key(self) -> str:
        """Return a short hash of the target and of what the sets hold."""
        digest = hashlib.sha256(f"{self._target.path.resolve()}{self._target.revision}".encode())
        for place in self._sets:
            digest.update((place / MANIFEST).read_bytes())
        return digest.hexdigest()[:12]

    def _trained(self, design: Design, label: str) -> Path:
        """Train one design, going on from its last checkpoint; return the draft's folder."""
        from transformers import AutoConfig, AutoTokenizer

        from fastdraft_hf.draft.init import init
        from fastdraft_hf.train.loop import train

        config = self._config
        work = self._folder / "probes" / label
        tokenizer = AutoTokenizer.from_pretrained(self._target.path)
        start = work / "start"
        if not start.exists():
            shape = draft_config(AutoConfig.from_pretrained(self._target.path), design, config)
            section = DesignConfig(**design.section(config))
            model, _ = init(self._target.path, shape, section, config.seed)
            with atomic_folder(start) as temporary:
                model.save_pretrained(temporary)
        train(
            start,
            tokenizer,
            self._data(tokenizer),
            work / "work",
            self._train,
            seed=config.seed,
            device=self._device,
            label=f"probe {design.name}",
        )
        return work / "work" / "model"

    def _data(self, tokenizer: Any) -> Path:
        """Write the rows all probes read, once, without held-out rows and evaluation text."""
        import datasets

        from fastdraft_hf.data.corpora import build_completions
        from fastdraft_hf.data.decontaminate import Decontaminator

        data = self._folder / "probes" / f"data-{self._rows_key()}-{self._config.seed}"
        if data.exists():
            return data
        overlaps = Decontaminator.of_task_sets().overlaps
        examples = []
        for source, place in zip(self._train.sources, self._sets, strict=True):
            made, rows, _ = build_completions(
                [source],
                tokenizer,
                generated=place.parent,
                overlaps=overlaps,
                max_length=_SEQUENCE,
                seed=self._config.seed,
            )
            examples += [
                example
                for example, (_, index) in zip(made, rows, strict=True)
                if not held_out(index)
            ]
        if not examples:
            raise FastDraftError("rows: nothing is left to train probes on")
        with atomic_folder(data) as temporary:
            datasets.Dataset.from_list(examples).save_to_disk(str(temporary / "train"))
        return data
