"""Run the stages of a recipe that are not finished, one folder a stage.

A stage works in ``.<stage>.partial``, which is renamed to ``<stage>`` at the end: a folder that
exists is finished. A stage resumes from its partial folder if its settings and inputs are the same.
If new settings only ask for more of the same, its finished folder becomes the partial one again.
"""

import contextlib
import functools
import logging
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from fastdraft_hf._atomic import publish_folder, read_json, room_to_write, write_json, write_text
from fastdraft_hf._errors import FastDraftError, nearest
from fastdraft_hf._processes import (
    barrier,
    drop_signal_stack,
    on_main,
    rank,
    start,
    world,
)
from fastdraft_hf.hub.folder import read_record
from fastdraft_hf.recipe import Recipe, resolve_device
from fastdraft_hf.stages import (
    bench,
    card,
    deadline,
    design,
    evaluate,
    export,
    generate,
    logits,
    provenance,
    reduced_vocabulary,
    report,
    train,
)
from fastdraft_hf.stages.run import CONFIG, PROVENANCE, RECIPE, SESSIONS, Run, locked

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Stage:
    """One step of a recipe.

    Attributes:
        run: does the work in a partial folder, which may hold the files of a killed run, and
            returns facts for the provenance.
        inputs: stages whose output it can read.
        parallel: whether every process calls ``run``, with the same folder. Otherwise the main
            one does, and the others wait. Only the main one's facts count.
        follows: inputs that may be extended; the stage then adds what is new to what it made.
        lacks: whether a finished folder lacks rows, because a damaged file was deleted. They are
            made again.
        keeps: files and folders in its folder that stay valid when its settings change from old
            to new. If all do, a finished stage is extended instead of refused.
    """

    run: Callable[[Run, Path], dict[str, Any]]
    inputs: tuple[str, ...] = ()
    parallel: bool = False
    follows: tuple[str, ...] = ()
    lacks: Callable[[Path], bool] = lambda folder: False
    keeps: Callable[[dict[str, Any], dict[str, Any]], Collection[str]] = lambda old, new: ()


def _training(name: str, *inputs: str) -> Stage:
    return Stage(functools.partial(train.run, name=name), inputs, parallel=True)


_TRAINED = ("design", "pretrain", "continue", "align")
_DRAFTS = (*_TRAINED, "reduced_vocabulary")
_CHATS = ("generate", "evaluate", "bench")  # in the mode of `chat_template_kwargs`
# In the order of a run.
STAGES = {
    "design": Stage(design.run),
    "generate": Stage(
        generate.run, parallel=True, lacks=generate.lacks_rows, keeps=generate.unchanged
    ),
    "logits": Stage(
        logits.run, ("generate",), parallel=True, follows=("generate",), lacks=logits.lacks_rows
    ),
    "pretrain": _training("pretrain", "design", "generate"),
    "continue": _training("continue", "design", "generate", "pretrain"),
    "align": _training("align", "generate", "logits", "design", "pretrain", "continue"),
    "reduced_vocabulary": Stage(reduced_vocabulary.run, ("generate", *_TRAINED)),
    "export": Stage(export.run, _DRAFTS),
    "evaluate": Stage(evaluate.run, _DRAFTS, parallel=True),
    "bench": Stage(bench.run, (*_DRAFTS, "export")),
    "card": Stage(card.run, (*_DRAFTS, "evaluate", "bench")),
    "report": Stage(report.run, ("generate", *_DRAFTS, "evaluate", "bench")),
}


def planned(recipe: Recipe) -> list[str]:
    """Return the stages a recipe has, in order. Every recipe has the report."""
    return [name for name in STAGES if name == "report" or recipe.section(name) is not None]


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

    def prepare() -> None:
        check_finished(run, stages)
        run.spent = deadline.seconds_spent(run)
        # For commands that name only the folder.
        recipe = yaml.safe_dump(run.recipe.resolved(), sort_keys=False)
        write_text(run.folder / RECIPE, recipe)

    with room_to_write(run.folder), locked(run.folder):
        on_main(prepare)
        for name in stages:
            _StageOfRun(run, name).execute()
            drop_signal_stack()


def check_finished(run: Run, stages: Sequence[str]) -> None:
    """Raise `FastDraftError` if a finished stage was made with other settings; changes nothing.

    Stages that are not to run must have been made with the same weights of the target, too.
    """
    target, weights = run.recipe.target, run.target_weights
    for name in planned(run.recipe):
        made = _StageOfRun(run, name).made(run.stage_folder(name))
        if not isinstance(made, dict) or made.get("target") != target:
            continue
        if made["target_weights"] != weights:
            raise FastDraftError(
                f"target: the weights in {target} are not those that {run.stage_folder(name)} was "
                "made with; restore them, or give another output_dir"
            )
    parts = {name: _StageOfRun(run, name) for name in stages}
    for part in parts.values():
        part.check()
    growing = [name for name, part in parts.items() if part.grew()]
    stale: list[str] = []
    for name, part in parts.items():
        changed = {*growing, *stale}.intersection(part.inputs)
        if changed and part.finished:
            (growing if changed <= {*part.stage.follows} else stale).append(name)
    if stale:
        raise FastDraftError(
            f"{growing[0]} must be extended, since the recipe asks for more than it made. These "
            f"were made before: {', '.join(str(parts[name].folder) for name in stale)}. Delete "
            "these folders to make them again, or give another output_dir."
        )


def grows(run: Run, name: str) -> bool:
    """Return whether a finished stage resumes: the recipe asks for more, or rows are missing."""
    return _StageOfRun(run, name).grows()


class _StageOfRun:
    """A stage in a run: what its folder was made from, and what the recipe asks for."""

    def __init__(self, run: Run, name: str) -> None:
        self.run, self.name, self.stage = run, name, STAGES[name]
        self.folder, self.partial = run.stage_folder(name), run.partial_folder(name)
        self.section = run.recipe.section(name)

    @property
    def finished(self) -> bool:
        return self.run.finished(self.name)

    @property
    def inputs(self) -> list[str]:
        """The stages whose output it reads with this recipe."""
        present, unread = {*planned(self.run.recipe)} - {*self.run.left_out}, ""
        training = self.run.recipe.training_stages().get(self.name)
        if training is not None and all(one.kind != "generated" for one in training.sources):
            unread = "generate"
        return [name for name in self.stage.inputs if name in present and name != unread]

    def wanted(self) -> dict[str, Any]:
        """Return all that decides the output: its settings, the run's, and its inputs' ids."""
        recipe = self.run.recipe
        inputs = {name: read_record(self.run.stage_folder(name)).get("id") for name in self.inputs}
        return {
            "target": recipe.target,
            "target_revision": recipe.target_revision,
            "target_weights": self.run.target_weights,
            "seed": recipe.seed,
            "chat_template_kwargs": recipe.chat_template_kwargs if self.name in _CHATS else {},
            self.name: None if self.section is None else self.section.deciding(),
            "inputs": inputs,
        }

    def made(self, folder: Path) -> Any:
        """Return what ``folder`` was made from, as `wanted`; ``None`` without a record."""
        path = folder / CONFIG
        try:
            made = yaml.safe_load(path.read_text(encoding="utf-8")) if path.exists() else None
        except (yaml.YAMLError, UnicodeDecodeError):
            raise FastDraftError(f"{path} is damaged; delete {folder} to make it again") from None
        if not isinstance(made, dict):
            return made
        # A setting that is newer than the folder had its default when the folder was made.
        if self.run.dry or "target_weights" not in made:
            made["target_weights"] = self.run.target_weights
        if self.section is not None:
            # One that is no longer valid differs in any case.
            with contextlib.suppress(FastDraftError, KeyError, TypeError):
                made[self.name] = type(self.section)(**made[self.name]).deciding()
        return made

    def kept(self, folder: Path) -> Collection[str]:
        """Return what stays valid of a folder that was made from something else."""
        made, wanted = self.made(folder), self.wanted()
        if not isinstance(made, dict):
            return ()
        for name in self.stage.follows:
            earlier = read_record(self.run.stage_folder(name)).get("extends", [])
            if made["inputs"].get(name) in earlier:
                made["inputs"][name] = wanted["inputs"][name]
        if made == wanted:
            return _contents(folder)
        # Nothing stays if more than the stage's own settings changed.
        if self.section is None or {**made, self.name: None} != {**wanted, self.name: None}:
            return ()
        return self.stage.keeps(made[self.name], wanted[self.name])

    def grew(self) -> bool:
        """Return whether all that a finished stage made stays valid under changed settings."""
        if not self.finished or self.made(self.folder) == self.wanted():
            return False
        return _contents(self.folder) <= {*self.kept(self.folder)}

    def grows(self) -> bool:
        return self.finished and (self.grew() or self.stage.lacks(self.folder))

    def check(self) -> None:
        """Refuse a folder that the recipe would make otherwise."""
        if not self.finished:
            if self.folder.exists():
                raise FastDraftError(
                    f"{self.folder} exists and was not made by a finished stage; move it away"
                )
            return
        changes = list(_differences(self.made(self.folder), self.wanted()))
        if changes and not self.grew():
            raise FastDraftError(
                f"{self.folder} was made with other settings ({'; '.join(changes[:4])}). Delete "
                "that folder to make it again, or give another output_dir."
            )

    def execute(self) -> None:
        """Run the stage if it is not finished."""
        if not on_main(self.open):
            logger.info("%s: already finished, in %s", self.name, self.folder)
            return
        if not self.stage.parallel:
            on_main(lambda: self.finish(self.stage.run(self.run, self.partial)))
            return
        # The main process downloads or converts the target; the others find the result.
        on_main(lambda: self.run.target)
        if not self.partial.exists():
            raise FastDraftError(
                f"{self.partial}: process {rank()} cannot see it; output_dir must be on a file "
                "system that all machines share"
            )
        facts = self.stage.run(self.run, self.partial)
        barrier()
        on_main(lambda: self.finish(facts))

    def open(self) -> bool:
        """Make or find the partial folder; return False if the stage is finished."""
        if self.finished and not self.grows():
            return False
        for name in self.inputs:
            if not self.run.finished(name):
                raise FastDraftError(
                    f"stage {self.name} reads the output of {name}, which is not finished in "
                    f"{self.run.folder}"
                )
            provenance.check_weights(self.run.stage_folder(name))
        wanted = self.wanted()
        if self.finished:
            self.reopen()
        if self.partial.exists() and self.made(self.partial) != wanted:
            self.move_aside()
        logger.info("%s: %s", self.name, "resumes" if self.partial.exists() else "starts")
        self.partial.mkdir(exist_ok=True)
        path = self.partial / SESSIONS
        runs = read_json(path)["runs"] if path.exists() else 0
        seconds = deadline.unfinished_seconds(self.partial)
        write_json(path, {"runs": runs + 1, "seconds": seconds, "started": time.time()})
        # Also when resuming: more may be wanted, or the folder may be older than a setting.
        write_text(self.partial / CONFIG, yaml.safe_dump(wanted, sort_keys=False))
        return True

    def move_aside(self) -> None:
        """Remove from the partial folder what is no longer valid; nothing is deleted."""
        kept, there = self.kept(self.partial), _contents(self.partial)
        stale, valid = sorted(there.difference(kept)), sorted(there.intersection(kept))
        if not stale:
            return
        aside = self.partial.with_name(f"{self.partial.name}-{time.time_ns()}")
        what = f"; kept: {', '.join(valid)}; moved: {', '.join(stale)}" if valid else ""
        logger.warning("%s: started with other settings; moved to %s%s", self.name, aside, what)
        if not valid:
            self.partial.rename(aside)
            return
        aside.mkdir()
        # The old settings stay until `open` writes the new ones. A run that is killed before that
        # finds them different and does the same again.
        write_text(aside / CONFIG, (self.partial / CONFIG).read_text(encoding="utf-8"))
        for name in stale:
            (self.partial / name).rename(aside / name)

    def reopen(self) -> None:
        """Make the finished folder the partial one; its record stays in it."""
        record = read_record(self.folder)
        if self.grew() and "id" in record:  # otherwise the same rows are made again: the same id
            record["extends"] = [*record.get("extends", []), record.pop("id")]
        write_json(self.folder / SESSIONS, {"runs": 1, "seconds": record.get("wall_seconds", 0.0)})
        write_json(self.folder / PROVENANCE, record)
        publish_folder(self.folder, self.partial)

    def finish(self, facts: dict[str, Any]) -> None:
        """Write the provenance and rename the folder."""
        target = self.run.look_at_target()  # a design may be made for a config without weights
        record = read_record(self.partial)  # of a stage that grew or was repaired
        sessions = read_json(self.partial / SESSIONS)
        seconds = sessions["seconds"] + time.time() - sessions["started"]
        plan = deadline.planned(self.run)
        write_json(
            self.partial / PROVENANCE,
            provenance.describe(
                id=record.get("id") or f"{self.name}-{time.time_ns():x}",
                extends=record.get("extends", []),
                stage=self.name,
                seed=self.run.recipe.seed,
                target=target.name,
                target_revision=target.revision,
                inputs=self.wanted()["inputs"],
                chat_template_kwargs=self.wanted()["chat_template_kwargs"],
                processes=world() if self.stage.parallel else 1,
                wall_seconds=round(seconds, 1),
                planned_minutes=sum(plan[p] or 0.0 for p in plan if p.startswith(self.name)),
                cut=[text for text in facts.pop("cut", []) if text],
                runs=sessions["runs"],
                weights=provenance.weights(self.partial),
                facts=facts,
            ),
        )
        (self.partial / SESSIONS).unlink()
        publish_folder(self.partial, self.folder)
        logger.info("%s: finished in %.0f s", self.name, seconds)


def _contents(folder: Path) -> set[str]:
    """Return the names of what a stage made in a folder."""
    return {entry.name for entry in folder.iterdir()} - {CONFIG, PROVENANCE, SESSIONS}


def _differences(old: Any, new: Any, path: str = "") -> Iterator[str]:
    """Yield the differences between two configurations, one readable line each."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in {**old, **new}:
            below = f"{path}.{key}" if path else str(key)
            yield from _differences(old.get(key), new.get(key), below)
    elif old != new:
        yield f"{path}: {old} then, {new} now"
