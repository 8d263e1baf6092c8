"""``fastdraft run RECIPE.yaml|RUN [--stages a,b] [--dry-run] [key=value ...]``."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fastdraft_hf._errors import FastDraftError
from fastdraft_hf._processes import is_main, stop

if TYPE_CHECKING:
    from fastdraft_hf.recipe import Recipe
    from fastdraft_hf.stages.run import Run

_EPILOG = """\
fastdraft run recipes/smollm2-135m/quickstart.yaml
fastdraft run RECIPE.yaml --stages design,generate align.learning_rate=2e-3
fastdraft run runs/mine --stages evaluate evaluate.num_assistant_tokens=5    the recipe of that run
fastdraft run --stages design target=ID output_dir=runs/mine design.params=50M

In several processes, the same recipe:
torchrun --nproc_per_node 8 recipes/run.py RECIPE.yaml

The settings of a stage: fastdraft schema STAGE
"""


def add_arguments(parser: argparse.ArgumentParser, name: str) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _EPILOG
    parser.add_argument(
        "recipe",
        nargs="?",
        metavar="RECIPE",
        help="a recipe file, or the folder of a run; without it, all settings are defaults",
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="changes to the recipe, such as align.learning_rate=2e-3 or output_dir=runs/second",
    )
    parser.add_argument("--stages", metavar="a,b", help="only these stages (default: all)")
    parser.add_argument(
        "--dry-run", action="store_true", help="print the recipe and its stages, run nothing"
    )


def run(args: argparse.Namespace) -> None:
    recipe = _read(args.recipe, args.overrides)
    stages = [s.strip() for s in args.stages.split(",") if s.strip()] if args.stages else None
    run_stages(recipe, stages, args.dry_run)


def _read(source: str | None, overrides: list[str]) -> Recipe:
    from fastdraft_hf.recipe import build_recipe, read_recipe
    from fastdraft_hf.stages.run import RECIPE

    if source is not None and "=" in source and not Path(source).exists():
        overrides = [source, *overrides]
        source = None
    if source is None:
        if not overrides:
            raise FastDraftError(
                "run: give a recipe file, the folder of a run, or settings such as target=ID "
                "output_dir=DIR"
            )
        return build_recipe({}, overrides)
    path = Path(source)
    if not path.is_dir():
        return read_recipe(path, overrides)
    if not (path / RECIPE).is_file():
        raise FastDraftError(f"{path} is not the folder of a run: it holds no {RECIPE}")
    return read_recipe(path / RECIPE, [f"output_dir={path}", *overrides])


def run_stages(recipe: Recipe, wanted: Sequence[str] | None, dry_run: bool) -> None:
    """Print the resolved recipe and run its stages, or say what would be run.

    The results of a wanted ``evaluate`` are printed at the end, also of one that was finished.
    """
    from fastdraft_hf.eval.summary import print_evaluation
    from fastdraft_hf.stages.run import Run
    from fastdraft_hf.stages.runner import choose, execute

    stages = choose(recipe, wanted)
    run = Run(recipe, Path(recipe.output_dir))
    if is_main():
        _print_plan(run, stages)
    quiet_libraries()
    if is_main():
        _check(run, stages, dry_run)
    if dry_run:
        return
    execute(run, stages)
    stop()
    if is_main() and wanted is not None and "evaluate" in wanted:
        path = run.stage_folder("evaluate") / "results.json"
        print_evaluation(json.loads(path.read_text(encoding="utf-8")))


def _print_plan(run: Run, stages: Sequence[str]) -> None:
    import yaml

    from fastdraft_hf.stages.runner import grows

    print(yaml.safe_dump(run.recipe.resolved(), sort_keys=False), end="", flush=True)
    print(f"\n{run.folder}:", file=sys.stderr)
    for name in stages:
        started = run.partial_folder(name).exists()
        state = "finished" if run.finished(name) else "started" if started else "to do"
        if grows(run, name):
            state = "to extend"
        print(f"  {name:<10} {state:<9} {run.stage_folder(name)}", file=sys.stderr)


def _check(run: Run, stages: Sequence[str], dry_run: bool) -> None:
    """Refuse what would stop the run late, before any work."""
    from fastdraft_hf.stages import reduced_vocabulary
    from fastdraft_hf.target.resolve import check_name

    check_name(run.recipe.target)
    for name, section in run.recipe.training_stages().items():
        if name in stages:
            try:  # what transformers or TRL refuse
                section.trainer_config("unused", seed=run.recipe.seed, device="cpu")
            except FastDraftError as error:
                raise FastDraftError(f"{name}.{error}") from None
    name = "reduced_vocabulary"
    if name in stages and not dry_run and not run.finished(name):
        reduced_vocabulary.check(run)


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
