"""The time limit of a whole run, ``max_hours``, shared out among what time can cut.

A *part* is ``logits``, a training stage, ``evaluate``, ``bench``, or a set of stage generate
(``generate.chat``; of Magpie also ``generate.chat-instructions``). Its share is decided when its
work begins, from the time that is really left. It is no setting and in no fingerprint: a finished
stage stays finished, whatever its share would be now.
"""

import logging
import time
from pathlib import Path

from fastdraft_hf._atomic import read_json, write_json
from fastdraft_hf.draft.families import count_parameters
from fastdraft_hf.hub.folder import read_record
from fastdraft_hf.recipe import Recipe
from fastdraft_hf.stages.run import SESSIONS, Run
from fastdraft_hf.target.resolve import load_config

logger = logging.getLogger(__name__)

MEASURING = ("evaluate", "bench")
# How often align reads the target's text where that is slow to write.
PASSES = 8
# In a run's folder: the rates of writing and training on this machine.
RATES = ".rates.json"
# Of a Magpie set's time. What its answers leave goes to further answers to the same instructions.
INSTRUCTIONS = 0.4
# The weight of parts without max_minutes: what recipes/any.yaml has; 10 of those not listed.
_MINUTES = {"generate": 25.0, "pretrain": 15.0, "continue": 15.0, "align": 60.0}


def parts(recipe: Recipe) -> dict[str, float | None]:
    """Return the ``max_minutes`` of every part, in the order of a run."""
    found: dict[str, float | None] = {}
    for name, one in (recipe.generate.sets if recipe.generate else {}).items():
        limit, magpie = one.max_minutes, one.kind == "magpie"
        if magpie:
            found[f"generate.{name}-instructions"] = limit and INSTRUCTIONS * limit
        found[f"generate.{name}"] = limit and (1 - INSTRUCTIONS * magpie) * limit
    if recipe.logits is not None:
        found["logits"] = None
    found |= {name: stage.max_minutes for name, stage in recipe.training_stages().items()}
    return found | {"evaluate": recipe.evaluate.max_minutes, "bench": recipe.bench.max_minutes}


def _stage(part: str) -> str:
    """Return the stage of a part: generate of ``generate.chat``."""
    return part.split(".")[0]


def planned_minutes(recipe: Recipe, parameters: int) -> dict[str, float | None]:
    """Return the minutes of every part if nothing is late; ``None`` is no limit.

    Without ``max_hours`` these are the parts' own ``max_minutes``. ``parameters`` are the target's.
    """
    own = parts(recipe)
    if recipe.max_hours is None:
        return own
    weights = {part: limit or _MINUTES.get(_stage(part), 10.0) for part, limit in own.items()}
    total = 60 * recipe.max_hours
    total = max(total / 2, total - _uncut(parameters))
    return {part: total * weight / sum(weights.values()) for part, weight in weights.items()}


def minutes(run: Run, part: str) -> float | None:
    """Return the minutes that a part may take from now on; ``None`` is no limit.

    The time that is left is shared in proportion to ``max_minutes``; if it is short, measuring is
    halved before learning is cut. A part gets a tenth of its plan at least, so that a late run
    makes a draft. To be called by the main process; the others take its number.
    """
    plan, hours = planned(run), run.recipe.max_hours
    if hours is None:
        return plan[part]
    coming = {
        name: plan[name] or 0.0
        for name in list(plan)[list(plan).index(part) :]
        if _stage(name) == _stage(part) or not run.finished(_stage(name))
    }
    used = (run.spent + time.monotonic() - run.started) / 60
    left = 60 * hours - used - _uncut(_parameters(run), run.finished("export"))
    _move_to_text(run, coming)
    wanted, measuring = sum(coming.values()), sum(coming.get(name, 0.0) for name in MEASURING)
    if part not in MEASURING and left < wanted:
        measured = max(measuring / 2, measuring - (wanted - left))
        left, wanted = left - measured, wanted - measuring
    share = max(left / wanted, 0.1) * coming[part]
    logger.info("%s: %.1f minutes (planned: %.1f)", part, share, coming[part])
    return share


def note_rates(run: Run, **found: float) -> None:
    """Add tokens ``written`` in ``minutes``, or tokens ``trained`` a minute, to what is known.

    Without ``max_hours`` nothing reads it, and nothing is written.
    """
    if run.recipe.max_hours is None:
        return
    known = rates_of(run)
    known |= {name: known.get(name, 0.0) + value for name, value in found.items()}
    write_json(run.folder / RATES, known)


def rates_of(run: Run) -> dict[str, float]:
    """Return what is known: tokens ``written``, in ``minutes``, and ``trained`` a minute."""
    path = run.folder / RATES
    return dict(read_json(path)) if path.exists() else {}


def _move_to_text(run: Run, coming: dict[str, float]) -> None:
    """Give time from align to generate, so that text is read `PASSES` times and no more.

    A slow target writes little in its share, which a small draft would read a hundred times.
    With G tokens written, g more a minute and t trained a minute, the time T of both is best shared
    where align reads PASSES (G + g (T − A)) tokens in its A minutes.
    """
    rates = rates_of(run)
    if "align" not in coming or not rates.get("trained") or not rates.get("minutes"):
        return
    parts = [name for name in coming if _stage(name) == "generate"]
    texts, align = sum(coming[name] for name in parts), coming["align"]
    written, speed = rates["written"], rates["written"] / rates["minutes"] if parts else 0.0
    most = PASSES * (written + speed * (texts + align)) / (rates["trained"] + PASSES * speed)
    moved = max(0.0, align - most)
    coming["align"] -= moved
    for name in parts:
        coming[name] *= 1 + moved / texts


def _uncut(parameters: int, exported: bool = False) -> float:
    """Return the minutes of what no share bounds: exports and their checks, card and report."""
    return 0.25 if exported else 1.0 + 2.0 * parameters / 1e9


def planned(run: Run) -> dict[str, float | None]:
    """Return `planned_minutes` of a run."""
    return planned_minutes(run.recipe, _parameters(run) if run.recipe.max_hours else 0)


def _parameters(run: Run) -> int:
    return count_parameters(load_config(run.look_at_target().path, "target"))


def seconds_spent(run: Run) -> float:
    """Return the seconds that all stages have run so far, by their records."""
    finished = [name for name in run.folders if run.finished(name)]
    records = [read_record(run.stage_folder(name)) for name in finished]
    partial = [run.partial_folder(name) for name in run.folders if name not in finished]
    seconds: float = sum(record.get("wall_seconds", 0.0) for record in records)
    return seconds + sum(map(unfinished_seconds, partial))


def unfinished_seconds(folder: Path) -> float:
    """Return the seconds of a stage that was killed; its newest file says when it was alive."""
    sessions = read_json(folder / SESSIONS) if (folder / SESSIONS).exists() else {}
    seconds: float = sessions.get("seconds", 0.0)
    if "started" in sessions:
        newest = max(file.stat().st_mtime for file in folder.rglob("*"))
        seconds += max(0.0, newest - sessions["started"])
    return seconds
