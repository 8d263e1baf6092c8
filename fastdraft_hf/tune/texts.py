"""Rows the target wrote, as texts that a draft's acceptance is read from."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastdraft_hf._errors import FastDraftError
from fastdraft_hf._progress import Progress
from fastdraft_hf.data.filters import read_kept_rows
from fastdraft_hf.eval.expected import Continuation, TextAcceptance, text_acceptance

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Texts are cut to this; the target reads them once for each draft.
MAX_NEW_TOKENS = 128
_LONGEST_PROMPT = 512
# One row in so many is measured on and never counted or trained on.
_ONE_IN = 5


def held_out(index: int) -> bool:
    """Return whether the row of this index is measured on only."""
    return index % _ONE_IN == 0


def texts_of(sets: Sequence[Path], count: int, seed: int) -> list[tuple[Continuation, float]]:
    """Return up to ``count`` held-out texts, in turn of the sets, with their own temperatures.

    Greedy rows are left out: at temperature 0 there is no distribution to compare.

    Raises:
        FastDraftError: there is none.
    """
    pools = []
    for place in sets:
        rows, _ = read_kept_rows(place)
        rows = [
            row
            for row in rows
            if held_out(row["index"])
            and row["temperature"] > 0
            and len(row["prompt_ids"]) <= _LONGEST_PROMPT
        ]
        random.Random(seed).shuffle(rows)
        pools.append([(place.name, row) for row in rows])
    found: list[tuple[Continuation, float]] = []
    for number in range(max(map(len, pools), default=0)):
        for pool in pools:
            if number < len(pool) and len(found) < count:
                name, row = pool[number]
                ids = tuple(row["completion_ids"][:MAX_NEW_TOKENS])
                text = Continuation(name, tuple(row["prompt_ids"]), ids)
                found.append((text, round(float(row["temperature"]), 4)))
    if not found:
        raise FastDraftError(
            f"rows: {', '.join(map(str, sets))}: no held-out text written at a temperature above 0"
        )
    return found


class Reader:
    """The target's reading of some texts, beside which drafts are held.

    Args:
        target: its folder.
        texts: texts and their temperatures.
        device: cpu or cuda.
    """

    def __init__(
        self, target: Path, texts: Sequence[tuple[Continuation, float]], device: str = "cpu"
    ) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
        self._model: PreTrainedModel = model.to(device).eval()
        self._texts, self._device = list(texts), device
        eos = self._model.generation_config.eos_token_id
        self._ends = eos if isinstance(eos, list) else [] if eos is None else [eos]

    def read(self, *drafts: Path) -> Any:
        """Return what the drafts' acceptance is along every text.

        Args:
            *drafts: folders; a reduced vocabulary is used as such.

        Returns:
            a list of `TextAcceptance` for one draft; a list of such lists for several. The
            target reads each text once.
        """
        import torch

        from fastdraft_hf.draft.reduced_vocabulary import load_draft

        models = [
            load_draft(folder, dtype=torch.float32).to(self._device).eval() for folder in drafts
        ]
        found: list[list[TextAcceptance]] = [[] for _ in models]
        with Progress("reading texts", len(self._texts), "texts") as progress:
            for text, temperature in self._texts:
                once: Any = _ReadOnce(self._model)
                for readings, model in zip(found, models, strict=True):
                    readings.append(text_acceptance(once, model, text, temperature, self._ends))
                progress.advance(1)
        return found[0] if len(found) == 1 else found


class _ReadOnce:
    """A model that answers the same call again from memory."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model, self._known = model, None
        self.config, self.device = model.config, model.device

    def __call__(self, **inputs: Any) -> Any:
        if self._known is None:
            self._known = self._model(**inputs)
        return self._known
