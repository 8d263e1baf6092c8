"""Runs the stages of a recipe that are not finished, one folder a stage.

A stage works in ``.<stage>.partial`` and its folder is renamed to ``<stage>`` when it is whole, so
a folder that exists is finished. What a killed run left in the partial folder is gone on with, as
long as the stage's settings and inputs are the same.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastdraft_hf._atomic import publish_folder, write_json, write_text
from fastdraft_hf._errors import FastDraftError, nearest
from fastdraft_hf._processes import Process, this_process, wait_until
from fastdraft_hf._schema import dump, load
from fastdraft_hf.pipeline import provenance
from fastdraft_hf.pipeline.energy import EnergyMeter, Joules, energy_facts, open_counters
from fastdraft_hf.pipeline.recipe import Recipe
from fastdraft_hf.targets.resolve import Target, resolve_target

logger = logging.getLogger(__name__)

CONFIG, PROVENANCE = "config.yaml", "provenance.json"


@dataclass
class Run:
    """A recipe, the folder it fills, and what stages ask it for."""

    recipe: Recipe
    folder: Path
    _target: Target | None = field(default=None, repr=False)

    @property
    def target(self) -> Target:
        """The target, found (and downloaded or converted) when first asked for."""
        if self._target is None:
            self._target = resolve_target(self.recipe.target, self.recipe.target_revision)
        return self._target

    def look_at_target(self) -> Target:
        """Find the target's config and tokenizer; its weights may be out of reach."""
        if self._target is not None:
            return self._target
        # Not kept: what is found may lack weights that a stage has yet to fetch.
        return resolve_target(self.recipe.target, self.recipe.target_revision, weights=False)

    def stage_folder(self, name: str) -> Path:
        return self.folder / STAGES[name].folder

    def finished(self, name: str) -> bool:
        return (self.stage_folder(name) / PROVENANCE).exists()

    def latest_model(self, before: str | None = None) -> Path:
        """Return the folder of the newest trained draft, or the designed one.

        Args:
            before: only stages that come before this one count.

        Raises:
            FastDraftError: there is none yet.
        """
        order = [
            n for n in ("design", "pretrain", "continue", "align") if n in planned(self.recipe)
        ]
        if before in order:
            order = order[: order.index(before)]
        for name in reversed(order):
            if self.finished(name):
                return self.stage_folder(name)
            if name != "design":
                raise FastDraftError(
                    f"stage {name} is not finished in {self.folder}; run it first (fastdraft run)"
                )
        raise FastDraftError(f"{self.folder} holds no draft yet; run stage design first")


@dataclass(frozen=True)
class Stage:
    """One step of a recipe.

    Attributes:
        run: does the work in the given partial folder and returns facts for the provenance. It
            may find what an earlier, killed call left there.
        section: the recipe's part it depends on.
        inputs: stages whose output it reads.
        folder: where its output goes.
    """

    run: Callable[[Run, Path], dict[str, Any]]
    section: Callable[[Recipe], Any]
    inputs: tuple[str, ...]
    folder: str


STAGES: dict[str, Stage] = {}


def register(name: str, stage: Stage) -> None:
    """Add a stage; the order of registration is the order of a run."""
    STAGES[name] = stage


def planned(recipe: Recipe) -> list[str]:
    """Return the stages a recipe has, in order."""
    import fastdraft_hf.pipeline.stages  # noqa: F401  (fills STAGES)

    return [name for name, stage in STAGES.items() if stage.section(recipe) is not None]


def choose(recipe: Recipe, wanted: Sequence[str] | None) -> list[str]:
    """Return the stages to run.

    Raises:
        FastDraftError: a wanted stage does not exist or is not in the recipe.
    """
    available = planned(recipe)
    if wanted is None:
        return available
    for name in wanted:
        if name not in STAGES:
            raise FastDraftError(
                f"no stage '{name}'{nearest(name, STAGES)}; stages: {', '.join(STAGES)}"
            )
        if name not in available:
            raise FastDraftError(f"the recipe has no section '{name}', so it cannot be run")
    return [name for name in available if name in wanted]


def execute(run: Run, stages: Sequence[str]) -> None:
    """Run the stages that are not finished.

    One of several processes (RANK, WORLD_SIZE) does its share of what the first one begins;
    stage generate is made for it.

    Raises:
        FastDraftError: a finished stage was made with other settings, an input is missing, or
            another process works in the folder.
    """
    run.folder.mkdir(parents=True, exist_ok=True)
    process = this_process()
    if not process.first:
        for name in stages:
            _join_stage(run, name, process)
        return
    with _locked(run.folder):
        check_finished(run, stages)
        for name in stages:
            if run.finished(name):
                logger.info("%s: finished before, in %s", name, run.stage_folder(name))
                continue
            _execute_stage(run, name)


def _join_stage(run: Run, name: str, process: Process) -> None:
    """Do this process's share of a stage that the first one begins and finishes."""
    partial = run.folder / f".{STAGES[name].folder}.partial"
    fingerprint = _fingerprint(run, name)
    wait_until(
        lambda: run.finished(name) or (partial.exists() and _read_config(partial) == fingerprint),
        run.folder,
        lambda: f"process 0 of {process.count} to begin stage {name}",
        minutes=30,
    )
    if run.finished(name):
        return
    try:
        STAGES[name].run(run, partial)
    except (FileNotFoundError, FastDraftError):
        # The first may finish the stage, and rename its folder, while another still reads in it.
        if not run.finished(name):
            raise


def _fingerprint(run: Run, name: str) -> dict[str, Any]:
    """Return what decides a stage's output: its settings, the run's, and its inputs' identity."""
    recipe = run.recipe.resolved()
    settings = recipe.get(name)
    if isinstance(settings, dict):
        section = STAGES[name].section(run.recipe)
        settings = {key: settings[key] for key in settings if key in _deciding(section)}
    present = planned(run.recipe)
    return {
        "target": recipe["target"],
        "target_revision": recipe["target_revision"],
        "seed": recipe["seed"],
        name: settings,
        "inputs": {
            other: _identity(run, other) for other in STAGES[name].inputs if other in present
        },
    }


def _identity(run: Run, name: str) -> str | None:
    path = run.stage_folder(name) / PROVENANCE
    if not path.exists():
        return None
    return str(json.loads(path.read_text(encoding="utf-8"))["id"])


def check_finished(run: Run, stages: Sequence[str]) -> None:
    """Raise `FastDraftError` when a finished stage was made with other settings; makes nothing."""
    for name in stages:
        _check_finished(run, name)


def _check_finished(run: Run, name: str) -> None:
    folder = run.stage_folder(name)
    if not run.finished(name):
        if folder.exists():
            raise FastDraftError(
                f"{folder} exists and was not made by a finished stage; move it away"
            )
        return
    made = _read_config(folder)
    wanted = _fingerprint(run, name)
    section = STAGES[name].section(run.recipe)
    if isinstance(made, dict) and isinstance(made.get(name), dict):
        # A setting that is newer than the folder had its default when the folder was made.
        known = _with_defaults(section, made[name])
        made[name] = {key: known[key] for key in known if key in _deciding(section)}
    changes = list(_differences(made, wanted))
    if changes:
        raise FastDraftError(
            f"{folder} was made with other settings ({'; '.join(changes[:4])}). Delete that "
            "folder to make it again, or give another output_dir."
        )


def _deciding(section: Any) -> list[str]:
    """Return the settings that decide what a stage makes, and not only where or how fast."""
    fields = dataclasses.fields(section)
    return [one.name for one in fields if one.metadata.get("output", True)]


def _with_defaults(section: Any, made: dict[str, Any]) -> dict[str, Any]:
    """Return a section's mapping with the defaults written out at every depth.

    One that the section cannot be made of any more stays as it is; it differs in any case.
    """
    try:
        return dict(dump(load(type(section), made)))
    except FastDraftError:
        return made


def _differences(old: Any, new: Any, path: str = "") -> Iterator[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *(k for k in new if k not in old)]:
            yield from _differences(
                old.get(key), new.get(key), f"{path}.{key}" if path else str(key)
            )
    elif old != new:
        yield f"{path}: {old} then, {new} now"


def _read_config(folder: Path) -> Any:
    import yaml

    path = folder / CONFIG
    return yaml.safe_load(path.read_text(encoding="utf-8")) if path.exists() else None


def _execute_stage(run: Run, name: str) -> None:
    import yaml

    stage = STAGES[name]
    for other in stage.inputs:
        if other in planned(run.recipe) and not run.finished(other):
            raise FastDraftError(
                f"stage {name} reads the output of {other}, which is not finished in {run.folder}"
            )
    partial = run.folder / f".{stage.folder}.partial"
    fingerprint = _fingerprint(run, name)
    if partial.exists() and _read_config(partial) != fingerprint:
        aside = partial.with_name(f"{partial.name}-{time.time_ns()}")
        logger.warning("%s: begun with other settings; moved aside to %s", name, aside)
        partial.rename(aside)
    resumed = partial.exists()
    partial.mkdir(exist_ok=True)
    if not resumed:
        write_text(partial / CONFIG, yaml.safe_dump(fingerprint, sort_keys=False))
    logger.info("%s: %s", name, "going on where it was" if resumed else "starts")
    sessions = partial / "sessions.json"
    earlier = json.loads(sessions.read_text(encoding="utf-8")) if sessions.exists() else []
    if earlier and earlier[-1]["seconds"] is None:  # killed: its last written file tells how long
        last = max(_modified(f) for f in partial.rglob("*"))
        earlier[-1]["seconds"] = max(0.0, last - earlier[-1]["started"])
    begun = {"started": time.time(), "seconds": None}

    def keep(joules: Joules) -> None:
        write_json(sessions, [*earlier, {**begun, "energy": joules}])

    write_json(sessions, [*earlier, begun])
    start = time.monotonic()
    with EnergyMeter(open_counters(run.recipe, name), keep) as meter:
        facts = stage.run(run, partial)
    seconds = time.monotonic() - start
    target = run.look_at_target()  # a design may be made for a config without weights
    write_json(
        partial / PROVENANCE,
        provenance.describe(
            id=f"{name}-{time.time_ns():x}",
            stage=name,
            seed=run.recipe.seed,
            target=target.name,
            target_revision=target.revision,
            inputs=fingerprint["inputs"],
            wall_seconds=round(seconds + sum(s["seconds"] for s in earlier), 1),
            runs=len(earlier) + 1,
            **energy_facts([*(s.get("energy") for s in earlier), meter.joules]),
            facts=facts,
        ),
    )
    sessions.unlink()
    publish_folder(partial, run.stage_folder(name))
    logger.info("%s: finished in %.0f s", name, seconds)


def _modified(path: Path) -> float:
    """Return when a file was last written; 0 for a folder, and for what another process renamed."""
    try:
        return path.stat().st_mtime if path.is_file() else 0.0
    except FileNotFoundError:
        return 0.0


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the run's folder for this process; a killed process lets go by itself."""
    from filelock import FileLock, Timeout

    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise FastDraftError(f"another fastdraft process works in {folder}") from None
    try:
        yield
    finally:
        lock.release()
