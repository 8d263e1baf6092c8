"""What commands share: running stages, printing settings and results."""

from __future__ import annotations

import logging
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fastdraft_hf._errors import FastDraftError
from fastdraft_hf._processes import is_main, stop

if TYPE_CHECKING:
    from fastdraft_hf._config import Section
    from fastdraft_hf.recipe import Recipe
    from fastdraft_hf.stages.run import Run


def run_stages(recipe: Recipe, wanted: Sequence[str] | None, dry_run: bool) -> None:
    """Print the resolved recipe and run its stages, or say what would be run."""
    from fastdraft_hf.stages.run import Run
    from fastdraft_hf.stages.runner import choose, execute

    stages = choose(recipe, wanted)
    run = Run(recipe, Path(recipe.output_dir))
    if is_main():
        _print_plan(run, stages)
    quiet_libraries()
    if is_main():
        _check(run, stages, dry_run)
    if not dry_run:
        execute(run, stages)
        stop()


def _print_plan(run: Run, stages: Sequence[str]) -> None:
    import yaml

    from fastdraft_hf.stages.runner import grows

    print(yaml.safe_dump(run.recipe.resolved(), sort_keys=False), end="", flush=True)
    print(f"\n{run.folder}:", file=sys.stderr)
    for name in stages:
        folder = run.stage_folder(name)
        begun = run.partial_folder(name).exists()
        state = "finished" if run.finished(name) else "started" if begun else "to do"
        if grows(run, name):
            state = "to extend"
        print(f"  {name:<10} {state:<9} {folder}", file=sys.stderr)


def _check(run: Run, stages: Sequence[str], dry_run: bool) -> None:
    """Refuse what would stop the run late, before any work."""
    from fastdraft_hf.stages.runner import check_finished
    from fastdraft_hf.target.resolve import check_name

    check_name(run.recipe.target)
    if run.recipe.training_stages().keys() & set(stages):
        _check_training(run.recipe, stages)
    if dry_run:
        return
    if "reduced_vocabulary" in stages and not run.finished("reduced_vocabulary"):
        from fastdraft_hf.stages import reduced_vocabulary

        reduced_vocabulary.check(run)
    check_finished(run, stages)


def _check_training(recipe: Recipe, stages: Sequence[str]) -> None:
    """Refuse settings that transformers or TRL refuse, before any work."""
    for name, section in recipe.training_stages().items():
        if name in stages:
            try:
                section.trainer_config("unused", seed=recipe.seed, device="cpu")
            except FastDraftError as error:
                raise FastDraftError(f"{name}.{error}") from None


def settings_text(section: type[Section]) -> str:
    """Return a section's settings, their defaults and descriptions, for a terminal."""
    lines = ["settings:"]
    for name, field in section.model_fields.items():
        text = field.description or ""
        default = field.get_default(call_default_factory=True)
        if not field.is_required() and default not in (None, {}, []):
            text += f" (default: {default})"
        lines += textwrap.wrap(text, 98, initial_indent=f"  {name:<28}", subsequent_indent=" " * 30)
    return "\n".join(lines)


def print_results(folder: Path) -> None:
    """Print the results of a finished stage evaluate, if there are any."""
    import json

    from fastdraft_hf.eval.summary import print_evaluation

    path = folder / "evaluate" / "results.json"
    if is_main() and path.exists():
        print_evaluation(json.loads(path.read_text(encoding="utf-8")))


def quiet_libraries() -> None:
    """Leave the terminal to our own progress bars and messages."""
    import warnings

    import datasets
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    datasets.disable_progress_bars()
    logging.getLogger("trl").setLevel(logging.ERROR)
    # TRL warns at import that parts of it are experimental; a user of ours cannot act on that.
    warnings.filterwarnings("ignore", module="trl")
