"""Run the stages of a recipe that are not finished, one folder a stage.

A stage works in ``.<stage>.partial``, which is renamed to ``<stage>`` at the end: a folder that
exists is finished. A stage resumes from its partial folder if its settings and inputs are the same.
If new settings only ask for more of the same, its finished folder becomes the partial one again.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastdraft_hf._atomic import publish_folder, write_json, write_text
from fastdraft_hf._errors import FastDraftError, nearest
from fastdraft_hf._processes import barrier, is_main, on_main, rank, start, world
from fastdraft_hf.recipe import Recipe, resolve_device
from fastdraft_hf.stages import provenance
from fastdraft_hf.stages.energy import energy_facts, measured_energy
from fastdraft_hf.stages.folders import (
    CONFIG,
    PROVENANCE,
    SESSIONS,
    contents,
    deciding,
    differences,
    locked,
    move_aside,
    open_sessions,
    read_config,
    reopen,
    with_defaults,
)
from fastdraft_hf.target.resolve import Target, resolve_target

logger = logging.getLogger(__name__)

# The recipe that a run's folder was last filled by.
RECIPE = "recipe.yaml"


@dataclass
class Run:
    """A recipe, its folder, and the target."""

    recipe: Recipe
    folder: Path
    _target: Target | None = field(default=None, repr=False)

    @property
    def target(self) -> Target:
        """The target; downloaded or converted on first use."""
        if self._target is None:
            self._target = resolve_target(self.recipe.target, self.recipe.target_revision)
        return self._target

    def look_at_target(self) -> Target:
        """Return the target with its config and tokenizer; its weights may be missing."""
        if self._target is not None:
            return self._target
        # Not kept: a stage may still need the weights.
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
        run: does the work in a partial folder, which may hold the files of a killed run, and
            returns facts for the provenance.
        section: returns the section of the recipe that it depends on.
        inputs: stages whose output it can read.
        folder: name of its output folder.
        parallel: whether every process calls ``run``, with the same folder. Otherwise the main
            one does, and the others wait. Only the main one's facts count.
        leaves_out: those of ``inputs`` that it does not read with this recipe.
        follows: inputs that may be extended; the stage then adds what is new to what it made.
        lacks: whether a finished folder lacks rows, because a damaged file was deleted. They are
            made again.
        keeps: files and folders in its folder that stay valid when its settings change from old
            to new. If all do, a finished stage is extended instead of refused.
    """

    run: Callable[[Run, Path], dict[str, Any]]
    section: Callable[[Recipe], Any]
    inputs: tuple[str, ...]
    folder: str
    parallel: bool = False
    leaves_out: Callable[[Recipe], Collection[str]] = lambda recipe: ()
    follows: tuple[str, ...] = ()
    lacks: Callable[[Path], bool] = lambda folder: False
    keeps: Callable[[dict[str, Any], dict[str, Any]], Collection[str]] = lambda old, new: ()


STAGES: dict[str, Stage] = {}


def register(name: str, stage: Stage) -> None:
    """Add a stage; the order of registration is the order of a run."""
    STAGES[name] = stage


def planned(recipe: Recipe) -> list[str]:
    """Return the stages a recipe has, in order."""
    import fastdraft_hf.stages.registry  # noqa: F401  (fills STAGES)

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
    """Run the stages that are not finished. With several processes, all of them call this.

    Raises:
        FastDraftError: a finished stage was made with other settings, an input is missing, or
            another run works in the folder.
    """
    start(cpu=resolve_device(run.recipe.device) == "cpu")
    with locked(run.folder):
        on_main(lambda: _prepare_folder(run, stages))
        for name in stages:
            _execute_stage(run, name)


def _prepare_folder(run: Run, stages: Sequence[str]) -> None:
    """Check the finished stages, then keep the recipe for those who name only the folder."""
    import yaml

    check_finished(run, stages)
    write_text(run.folder / RECIPE, yaml.safe_dump(run.recipe.resolved(), sort_keys=False))


def _fingerprint(run: Run, name: str) -> dict[str, Any]:
    """Return all that decides a stage's output: its settings, the run's, and its inputs' ids."""
    recipe = run.recipe.resolved()
    settings = recipe.get(name)
    if isinstance(settings, dict):
        section = STAGES[name].section(run.recipe)
        settings = {key: settings[key] for key in settings if key in deciding(section)}
    return {
        "target": recipe["target"],
        "target_revision": recipe["target_revision"],
        "seed": recipe["seed"],
        name: settings,
        "inputs": {other: _identity(run, other) for other in _inputs(run.recipe, name)},
    }


def _inputs(recipe: Recipe, name: str) -> list[str]:
    """Return the stages whose output a stage reads with this recipe."""
    stage, present = STAGES[name], planned(recipe)
    left_out = stage.leaves_out(recipe)
    return [other for other in stage.inputs if other in present and other not in left_out]


def _identity(run: Run, name: str) -> str | None:
    identity: str | None = _record(run.stage_folder(name)).get("id")
    return identity


def _record(folder: Path) -> dict[str, Any]:
    """Return a folder's provenance; nothing if it has none."""
    path = folder / PROVENANCE
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def check_finished(run: Run, stages: Sequence[str]) -> None:
    """Raise `FastDraftError` if a finished stage was made with other settings; changes nothing."""
    for name in stages:
        _check_finished(run, name)
    growing = [name for name in stages if run.finished(name) and _grew(run, name)]
    stale: list[str] = []
    for name in stages:
        changed = {*growing, *stale}.intersection(_inputs(run.recipe, name))
        if changed and run.finished(name):
            (growing if changed <= {*STAGES[name].follows} else stale).append(name)
    if stale:
        raise FastDraftError(
            f"{growing[0]} must be extended, since the recipe asks for more than it made. These "
            f"were made before: {', '.join(str(run.stage_folder(name)) for name in stale)}. Delete "
            "these folders to make them again, or give another output_dir."
        )


def grows(run: Run, name: str) -> bool:
    """Return whether a finished stage resumes: the recipe asks for more, or rows are missing."""
    if not run.finished(name):
        return False
    return _grew(run, name) or STAGES[name].lacks(run.stage_folder(name))


def _grew(run: Run, name: str) -> bool:
    """Return whether all that a finished stage made stays valid under changed settings."""
    folder = run.stage_folder(name)
    made, wanted = _made(run, name, folder), _fingerprint(run, name)
    return made != wanted and contents(folder) <= {*_kept(run, name, folder, made, wanted)}


def _kept(run: Run, name: str, folder: Path, made: Any, wanted: dict[str, Any]) -> Collection[str]:
    """Return what stays valid of a folder that was made with another fingerprint."""
    if not isinstance(made, dict):
        return ()
    inputs = dict(made.get("inputs") or {})
    for other in STAGES[name].follows:
        if inputs.get(other) in _record(run.stage_folder(other)).get("extends", []):
            inputs[other] = wanted["inputs"][other]
    made = {**made, "inputs": inputs}
    if made == wanted:
        return contents(folder)
    # Nothing stays if more than the stage's own settings changed.
    if not isinstance(made.get(name), dict) or {**made, name: None} != {**wanted, name: None}:
        return ()
    return STAGES[name].keeps(made[name], wanted[name])


def _check_finished(run: Run, name: str) -> None:
    folder = run.stage_folder(name)
    if not run.finished(name):
        if folder.exists():
            raise FastDraftError(
                f"{folder} exists and was not made by a finished stage; move it away"
            )
        return
    changes = list(differences(_made(run, name, folder), _fingerprint(run, name)))
    if changes and not grows(run, name):
        raise FastDraftError(
            f"{folder} was made with other settings ({'; '.join(changes[:4])}). Delete that "
            "folder to make it again, or give another output_dir."
        )


def _made(run: Run, name: str, folder: Path) -> Any:
    """Return the fingerprint that a stage's folder was made with."""
    made = read_config(folder)
    section = STAGES[name].section(run.recipe)
    if isinstance(made, dict) and isinstance(made.get(name), dict):
        # A setting that is newer than the folder had its default when the folder was made.
        known = with_defaults(section, made[name])
        made[name] = {key: known[key] for key in known if key in deciding(section)}
    return made


def _execute_stage(run: Run, name: str) -> None:
    partial = run.folder / f".{STAGES[name].folder}.partial"
    earlier = on_main(lambda: _open(run, name, partial))
    if earlier is None:
        logger.info("%s: already finished, in %s", name, run.stage_folder(name))
        return
    if not STAGES[name].parallel:
        on_main(lambda: _finish(run, name, partial, *_work(run, name, partial, earlier)))
        return
    # The main process downloads or converts the target; the others find the result.
    on_main(lambda: run.target)
    if not partial.exists():
        raise FastDraftError(
            f"{partial}: process {rank()} cannot see it; output_dir must be on a file system that "
            "all machines share"
        )
    if is_main():
        done = _work(run, name, partial, earlier)
    else:
        STAGES[name].run(run, partial)
    barrier()
    on_main(lambda: _finish(run, name, partial, *done))


def _open(run: Run, name: str, partial: Path) -> list[dict[str, Any]] | None:
    """Make or find a stage's partial folder; return its earlier runs, ``None`` if finished."""
    import yaml

    if run.finished(name) and not grows(run, name):
        return None
    for other in _inputs(run.recipe, name):
        if not run.finished(other):
            raise FastDraftError(
                f"stage {name} reads the output of {other}, which is not finished in {run.folder}"
            )
    fingerprint = _fingerprint(run, name)
    if run.finished(name):
        record = _record(run.stage_folder(name))
        if _grew(run, name):  # otherwise the same rows are made again, and the id stays
            record = {"extends": [*record.get("extends", []), record["id"]]}
        reopen(run.stage_folder(name), partial)
        write_json(partial / PROVENANCE, record)
    if partial.exists():
        made = _made(run, name, partial)
        if made != fingerprint:
            move_aside(partial, _kept(run, name, partial, made, fingerprint), name)
    resumed = partial.exists()
    partial.mkdir(exist_ok=True)
    # Also when resuming: more may be wanted, or the folder may be older than a setting.
    write_text(partial / CONFIG, yaml.safe_dump(fingerprint, sort_keys=False))
    logger.info("%s: %s", name, "resumes" if resumed else "starts")
    return open_sessions(partial)


def _work(
    run: Run, name: str, partial: Path, earlier: list[dict[str, Any]]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Run a stage in the main process; return its facts and all of its runs."""
    session: dict[str, Any] = {"started": time.time(), "seconds": None}
    write_json(partial / SESSIONS, [*earlier, session])
    start = time.monotonic()
    with measured_energy(run.recipe, name) as joules:
        facts = STAGES[name].run(run, partial)
    session |= {"seconds": time.monotonic() - start, "energy": joules}
    return facts, [*earlier, session]


def _finish(
    run: Run,
    name: str,
    partial: Path,
    facts: dict[str, Any],
    sessions: list[dict[str, Any]],
) -> None:
    """Write the provenance and rename the folder."""
    target = run.look_at_target()  # a design may be made for a config without weights
    record = _record(partial)  # of a stage that grew or was repaired
    write_json(
        partial / PROVENANCE,
        provenance.describe(
            id=record.get("id") or f"{name}-{time.time_ns():x}",
            extends=record.get("extends", []),
            stage=name,
            seed=run.recipe.seed,
            target=target.name,
            target_revision=target.revision,
            inputs=_fingerprint(run, name)["inputs"],
            processes=world() if STAGES[name].parallel else 1,
            wall_seconds=round(sum(one["seconds"] for one in sessions), 1),
            runs=len(sessions),
            **energy_facts([one.get("energy") for one in sessions]),
            facts=facts,
        ),
    )
    (partial / SESSIONS).unlink()
    publish_folder(partial, run.stage_folder(name))
    logger.info("%s: finished in %.0f s", name, sessions[-1]["seconds"])
