"""``fastdraft run RECIPE.yaml|RUN [--stages a,b] [--dry-run] [key=value ...]``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastdraft_hf.recipe import Recipe

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
    from fastdraft_hf.cli._running import print_results, run_stages

    recipe = _read(args.recipe, args.overrides)
    stages = [s.strip() for s in args.stages.split(",") if s.strip()] if args.stages else None
    run_stages(recipe, stages, args.dry_run)
    if not args.dry_run and stages is not None and "evaluate" in stages:
        print_results(Path(recipe.output_dir))


def _read(source: str | None, overrides: list[str]) -> Recipe:
    from fastdraft_hf._errors import FastDraftError
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
