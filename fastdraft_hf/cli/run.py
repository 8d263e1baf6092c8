"""``fastdraft run RECIPE.yaml [--stages a,b] [--dry-run] [key=value …]``."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser, name: str) -> None:
    parser.add_argument("recipe", type=Path, metavar="RECIPE.yaml", help="the recipe file")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="changes to the recipe, such as align.learning_rate=2e-3 or output_dir=runs/second",
    )
    parser.add_argument("--stages", metavar="a,b", help="only these stages; default: all of it")
    parser.add_argument(
        "--dry-run", action="store_true", help="print the resolved recipe and the plan, do nothing"
    )


def run(args: argparse.Namespace) -> None:
    from fastdraft_hf.cli._running import run_stages
    from fastdraft_hf.recipe import read_recipe

    recipe = read_recipe(args.recipe, args.overrides)
    stages = [s.strip() for s in args.stages.split(",") if s.strip()] if args.stages else None
    run_stages(recipe, stages, args.dry_run)
