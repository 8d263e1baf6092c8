"""A run's folder as the Hub's commands read it: the draft, its records and exports.

It goes by the names of folders and imports no stage, so that a folder copied from another machine
can be pushed too.
"""

from __future__ import annotations

import functools
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastdraft_hf._errors import FastDraftError
from fastdraft_hf.eval.summary import TRAINING_STAGES, RunSummary, read_summary

# Stage to folder, in the order of a run; a test compares it with the stages' own.
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
    """A draft and the run that made it.

    Attributes:
        draft: the checkpoint's folder.
        run: the run's folder, ``None`` for a draft without its run.
    """

    draft: Path
    run: Path | None

    @functools.cached_property
    def summary(self) -> RunSummary:
        """The run's records; empty without a run."""
        run = self.run
        return read_summary({} if run is None else {s: run / name for s, name in FOLDERS.items()})

    @functools.cached_property
    def records(self) -> dict[str, Any]:
        """The provenance of every stage; for a draft without its run, what it came with."""
        record = read_record(self.draft)
        alone = {record["stage"]: record} if "stage" in record else record
        return dict(self.summary.provenance) or alone

    def openvino_folders(self) -> list[Path]:
        """Return the draft's finished OpenVINO folders, beside it or in the run's export."""
        parents = [self.draft, *([self.run / "export"] if self.run else [])]
        found = [f for parent in parents for f in sorted(parent.glob("openvino-*"))]
        named = [f for f in found if re.fullmatch(r"openvino-[\w.-]+", f.name)]
        return [f for f in named if (f / "openvino_model.xml").is_file()]


def find_run(folder: Path) -> RunFolder:
    """Find the draft and the run that ``folder`` is or contains.

    Raises:
        FastDraftError: there is no finished draft.
    """
    if not folder.is_dir():
        raise FastDraftError(f"there is no folder {folder}")
    if (folder / "config.json").is_file():
        parent = folder.resolve().parent
        return RunFolder(folder, parent if folder.name == "draft" and _is_run(parent) else None)
    draft = folder / FOLDERS["card"]
    if (draft / "config.json").is_file():
        return RunFolder(draft, folder)
    if _is_run(folder):
        raise FastDraftError(
            f"{folder} holds no finished draft yet; finish the run with `fastdraft run`"
        )
    raise FastDraftError(
        f"{folder} is neither a run's folder nor a draft's: it has no config.json and no draft/"
    )


def _is_run(folder: Path) -> bool:
    return (folder / "recipe.yaml").is_file() or any(
        (folder / name / "provenance.json").is_file() for name in FOLDERS.values()
    )


def default_name(target: str, evaluation: dict[str, Any] | None) -> str:
    """Return a draft's default name: its target's, and its size where that is known."""
    base = re.sub(r"[^A-Za-z0-9._-]", "-", target.split("/")[-1])
    if evaluation is None:
        return f"{base}-FastDraft"
    return f"{base}-FastDraft-{evaluation['draft_parameters'] / 1e6:.0f}M"


def read_record(folder: Path) -> dict[str, Any]:
    """Return a folder's provenance record, empty when it has none."""
    path = folder / "provenance.json"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise FastDraftError(f"{path} is not JSON ({error})") from None
    return record if isinstance(record, dict) else {}


def earlier_training(draft: Path) -> dict[str, Any] | None:
    """Return how long a draft was trained that this package made.

    Args:
        draft: a published draft's folder, a run's ``draft``, or the folder of one of its stages.

    Returns:
        ``tokens`` and ``seconds`` of its training stages and of the training before them; ``None``
        where no record says it.
    """
    record = read_record(draft)
    stages = list(FOLDERS)
    if record.get("stage") in stages:  # in a run: its own stage and those before
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
