"""What every command that runs stages shares."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fastdraft_hf._atomic import write_text
from fastdraft_hf._errors import FastDraftError
from fastdraft_hf._processes import this_process

if TYPE_CHECKING:
    from fastdraft_hf.recipe import Recipe

# The recipe a run's folder was last filled by; a stage's command takes it up again.
RECIPE_FILE = "recipe.yaml"


def run_stages(recipe: Recipe, wanted: Sequence[str] | None, dry_run: bool) -> None:
    """Print the resolved recipe and run its stages, or say what would be run."""
    import yaml

    from fastdraft_hf.stages.runner import STAGES, Run, check_finished, choose, execute, grows

    process = this_process()
    if process.count > 1 and wanted != ["generate"]:
        raise FastDraftError(
            f"started as one of {process.count} processes (WORLD_SIZE), and only generate runs in "
            "several; several train with: accelerate launch recipes/train.py --config my.yaml"
        )
    stages = choose(recipe, wanted)
    run = Run(recipe, Path(recipe.output_dir))
    if not process.first:
        quiet_libraries()
        if not dry_run:
            execute(run, stages)
        return
    print(yaml.safe_dump(recipe.resolved(), sort_keys=False), end="", flush=True)
    print(f"\n{run.folder}:", file=sys.stderr)
    for name in stages:
        folder = run.stage_folder(name)
        begun = (run.folder / f".{STAGES[name].folder}.partial").exists()
        state = "finished" if run.finished(name) else "begun" if begun else "to do"
        if grows(run, name):
            state = "to go on"
        print(f"  {name:<10} {state:<9} {folder}", file=sys.stderr)
    if recipe.training_stages().keys() & set(stages):
        quiet_libraries()
        _check_trainer_args(recipe, stages)
    if dry_run:
        return
    quiet_libraries()
    if "reduced_vocabulary" in stages and not run.finished("reduced_vocabulary"):
        from fastdraft_hf.stages import reduced_vocabulary

        reduced_vocabulary.check(run)
    # Settings that a finished stage refuses must not become the folder's recipe.
    check_finished(run, stages)
    write_text(run.folder / RECIPE_FILE, yaml.safe_dump(recipe.resolved(), sort_keys=False))
    execute(run, stages)


def _check_trainer_args(recipe: Recipe, stages: Sequence[str]) -> None:
    """Refuse bad objectives and ``trainer_args`` before any work; the trainer's config is asked."""
    from fastdraft_hf.train.loop import training_arguments

    for name, section in recipe.training_stages().items():
        if name in stages:
            try:
                training_arguments(section, Path("unused"), seed=0, device="cpu")
            except FastDraftError as error:
                raise FastDraftError(f"{name}.{error}") from None


def quiet_libraries() -> None:
    """Leave the terminal to our own progress; warnings that matter still come through."""
    import warnings

    import datasets
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    datasets.disable_progress_bars()
    logging.getLogger("trl").setLevel(logging.ERROR)
    # TRL marks parts of itself as experimental at import; nothing a user of ours can act on.
    warnings.filterwarnings("ignore", module="trl")
