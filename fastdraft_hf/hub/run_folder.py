"""A run's folder, read as it lies: its draft, its records, its exports and generated sets.

It knows folders by name and imports nothing of the pipeline, so that a folder copied from another
machine can be put on a card and pushed as well.
"""

from __future__ import annotations

import functools
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastdraft_hf._errors import FastDraftError
from fastdraft_hf.eval.summary import TRAINING_STAGES, RunSummary, read_summary
from fastdraft_hf.hub.card import OpenVINOCopy, best_num_assistant_tokens, render_card

if TYPE_CHECKING:
    from huggingface_hub import ModelCard

# Stage to folder, in the order of a run; `tests/hub/test_run_folder.py` compares it with the
# pipeline's own.
FOLDERS = {
    "design": "design",
    "generate": "generate",
    "logits": "logits",
    "pretrain": "pretrain",
    "continue": "continue",
    "align": "align",
    "reduced_vocabulary": "reduced",
    "export": "export",
    "evaluate": "evaluate",
    "bench": "bench",
    "card": "draft",
    "report": "report",
}


@dataclass
class RunFolder:
    """What a user names: a run's folder, or a draft's.

    Attributes:
        draft: the folder of the checkpoint, ``None`` when the run has none yet.
        run: the run's folder, ``None`` when the draft stands alone.
    """

    draft: Path | None
    run: Path | None

    @functools.cached_property
    def summary(self) -> RunSummary:
        """The run's records; empty without a run."""
        run = self.run
        return read_summary({} if run is None else {s: run / name for s, name in FOLDERS.items()})

    def openvino_folders(self) -> list[Path]:
        """Return the draft's OpenVINO folders, beside it or in the run's export."""
        places = [p for p in (self.draft, self.run and self.run / "export") if p is not None]
        found = [f for place in places for f in sorted(place.glob("openvino-*"))]
        return [f for f in found if (f / "openvino_model.xml").is_file()]

    def generated_sets(self) -> list[Path]:
        """Return the finished sets that the target wrote."""
        if self.run is None or not (self.run / "generate" / "provenance.json").is_file():
            return []
        sets = sorted((self.run / "generate").iterdir())
        return [s for s in sets if (s / "manifest.json").is_file()]


def find_run(folder: Path) -> RunFolder:
    """Find the draft and the run that ``folder`` is or holds.

    Raises:
        FastDraftError: it is neither a run's folder nor a checkpoint's.
    """
    if not folder.is_dir():
        raise FastDraftError(f"there is no folder {folder}")
    if (folder / "config.json").is_file():
        parent = folder.resolve().parent
        return RunFolder(folder, parent if _is_run(parent) and folder.name == "draft" else None)
    draft = folder / FOLDERS["card"]
    if (draft / "config.json").is_file():
        return RunFolder(draft, folder)
    if _is_run(folder):
        return RunFolder(None, folder)
    raise FastDraftError(
        f"{folder} is neither a run's folder nor a draft's: no config.json, no draft/"
    )


def _is_run(folder: Path) -> bool:
    return (folder / "recipe.yaml").is_file() or any(
        (folder / name / "provenance.json").is_file() for name in FOLDERS.values()
    )


def card_of_run(
    found: RunFolder,
    *,
    draft_location: str,
    openvino: OpenVINOCopy | None = None,
    datasets: list[str] | None = None,
    weights_note: str = "",
) -> ModelCard:
    """Render the card of a run from its records alone.

    Names, license and language are those of the card that the run has; without one they come from
    ``recipe.yaml`` and the stages' provenance.

    Raises:
        FastDraftError: the run has no records or no evaluation, or breaks a rule of the Hub.
    """
    summary = found.summary
    if summary.evaluation is None or not summary.provenance:
        raise FastDraftError(
            f"{found.run or found.draft}: a card needs the records of a run with evaluate/ finished"
        )
    made = _card_settings(found)
    record = next(reversed(summary.provenance.values()))
    target = record.get("target") or "the target"
    gamma = summary.provenance.get("card", {}).get("facts", {}).get("num_assistant_tokens")
    return render_card(
        summary,
        model_name=made.get("model_name") or default_name(target, summary.evaluation),
        target_name=target,
        target_revision=record.get("target_revision"),
        license=made.get("license"),
        base_model=made.get("base_model"),
        language=made.get("language") or (),
        draft_location=draft_location,
        num_assistant_tokens=gamma
        or best_num_assistant_tokens(summary, summary.evaluation["num_assistant_tokens"]),
        openvino=openvino,
        datasets=datasets or (),
        weights_note=weights_note,
    )


def default_name(target: str, evaluation: dict[str, Any] | None) -> str:
    """Return the name a draft gets: its target's, and its size where that is known."""
    base = re.sub(r"[^A-Za-z0-9._-]", "-", target.split("/")[-1])
    if evaluation is None:
        return f"{base}-FastDraft"
    return f"{base}-FastDraft-{evaluation['draft_parameters'] / 1e6:.0f}M"


def _card_settings(found: RunFolder) -> dict[str, Any]:
    import yaml

    recipe = found.run / "recipe.yaml" if found.run else None
    made: dict[str, Any] = {}
    if recipe is not None and recipe.is_file():
        resolved = yaml.safe_load(recipe.read_text(encoding="utf-8")) or {}
        made = {k: v for k, v in (resolved.get("card") or {}).items() if v}
    facts = found.summary.provenance.get("card", {}).get("facts", {})
    keys = ("model_name", "license", "base_model", "language")
    return {**made, **{key: facts[key] for key in keys if facts.get(key)}}


def read_record(folder: Path) -> dict[str, Any]:
    """Return a folder's provenance record, empty when it has none."""
    path = folder / "provenance.json"
    if not path.is_file():
        return {}
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return record


def earlier_training(draft: Path) -> dict[str, Any] | None:
    """Return what a draft was trained on before, of one that this package made.

    Args:
        draft: a published draft's folder, a run's ``draft``, or the folder of one of its stages.

    Returns:
        ``tokens`` and ``seconds`` of its training stages and of those before them; ``None`` where
        no records say it.
    """
    record = read_record(draft)
    stages = list(FOLDERS)
    if record.get("stage") in stages:  # of a run: its own stage and those before
        before = stages[: stages.index(record["stage"]) + 1]
        records = {stage: read_record(draft.parent / FOLDERS[stage]) for stage in before}
    else:  # published: the records of all stages in one file
        records = {stage: found for stage, found in record.items() if stage in stages}
    tokens, seconds = 0, 0.0
    for stage, found in records.items():
        facts = found.get("facts", {})
        if stage in TRAINING_STAGES:
            tokens += int(facts.get("tokens", 0))
            seconds += float(found.get("wall_seconds", 0.0))
        earlier = facts.get("earlier") or {} if stage == "design" else {}
        tokens += int(earlier.get("tokens", 0))
        seconds += float(earlier.get("seconds", 0.0))
    return {"tokens": tokens, "seconds": round(seconds, 1)} if tokens else None
