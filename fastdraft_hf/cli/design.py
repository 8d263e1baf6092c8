"""``fastdraft design``: the draft's shape as a table, and the draft itself."""

from __future__ import annotations

import argparse
from pathlib import Path

from fastdraft_hf.cli import stage
from fastdraft_hf.cli.stage import recipe_of


def add_arguments(parser: argparse.ArgumentParser, name: str) -> None:
    stage.add_arguments(parser, name)
    group = parser.add_argument_group(
        "search", "instead of making a draft; fastdraft tune has every setting"
    )
    group.add_argument(
        "--measure",
        choices=("cpu", "cuda", "openvino"),
        help="time drafts of --params on this machine and say which depth, width and γ are best",
    )
    group.add_argument(
        "--acceptance",
        metavar="VALUE",
        help="acceptance rate to predict with: a number, or one by depth such as {1: 0.3, 4: 0.4}",
    )


def run(args: argparse.Namespace) -> None:
    if args.measure is not None:
        _search(args)
        return
    import sys

    from fastdraft_hf.cli._running import run_stages
    from fastdraft_hf.draft.describe import design_rows
    from fastdraft_hf.eval.terminal import print_table
    from fastdraft_hf.recipe import build_recipe
    from fastdraft_hf.stages.design import planned_config
    from fastdraft_hf.stages.runner import Run

    # With nowhere to write it, the question is what the draft would be.
    asking = args.output_dir is None and args.config is None and args.target is not None
    if asking:
        args.output_dir = "unused"
    recipe = recipe_of(args, known=not asking)
    if not asking and not args.dry_run:
        run_stages(recipe, ["design"], dry_run=False)
    elif not asking:
        run_stages(recipe, ["design"], dry_run=True)
    made = Path(recipe.output_dir) / "design"
    if not asking and (made / "config.json").is_file():
        recipe = build_recipe({**recipe.resolved(), "design": {"draft": str(made)}})
    target, draft = planned_config(Run(recipe, Path(recipe.output_dir)))
    print("", file=sys.stderr)
    print_table(design_rows(target, draft))
    if asking:
        print("\nnothing is written; give --output-dir DIR to make it", file=sys.stderr)


def _search(args: argparse.Namespace) -> None:
    import yaml

    from fastdraft_hf._errors import FastDraftError
    from fastdraft_hf.cli.tune import tune
    from fastdraft_hf.tune.config import TuneConfig

    folder = Path(args.output_dir or "runs/tune")
    args.output_dir = str(folder)  # a recipe needs one; nothing of a run is written there
    recipe = recipe_of(args, known=False)
    settings = {"params": recipe.design.params, "measure": args.measure}
    if args.acceptance is not None:
        try:
            settings["acceptance"] = yaml.safe_load(args.acceptance)
        except yaml.YAMLError as error:
            raise FastDraftError(f"acceptance: '{args.acceptance}' is no YAML value") from error
    tune(TuneConfig(**settings), recipe.target, folder)
