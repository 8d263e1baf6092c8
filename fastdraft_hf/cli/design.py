"""``fastdraft design``: the draft's shape as a table, and the draft itself."""

from __future__ import annotations

import argparse
from pathlib import Path

from fastdraft_hf.cli.stage import add_arguments, recipe_of

__all__ = ["add_arguments", "run"]


def run(args: argparse.Namespace) -> None:
    import sys

    from fastdraft_hf.cli._running import run_stages
    from fastdraft_hf.drafts.describe import design_rows
    from fastdraft_hf.evaluation.terminal import print_table
    from fastdraft_hf.pipeline.recipe import build_recipe
    from fastdraft_hf.pipeline.run import Run
    from fastdraft_hf.pipeline.stages.design import planned_config

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
