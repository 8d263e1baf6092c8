"""One command a stage: its settings as options, alone or within a recipe."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastdraft_hf.cli._fields import add_fields

if TYPE_CHECKING:
    from fastdraft_hf.recipe import Recipe

# The section whose fields become a command's options; the rest of these stages' input is other
# stages' output.
_SECTIONS = {
    "design": ("fastdraft_hf.draft.config", "DesignConfig"),
    "generate": ("fastdraft_hf.data.config", "GenerateConfig"),
    "logits": ("fastdraft_hf.data.config", "LogitsConfig"),
    "pretrain": ("fastdraft_hf.train.config", "TrainConfig"),
    "continue": ("fastdraft_hf.train.config", "TrainConfig"),
    "align": ("fastdraft_hf.train.config", "TrainConfig"),
    "reduced_vocabulary": ("fastdraft_hf.tune.config", "ReducedVocabularyConfig"),
    "export": ("fastdraft_hf.export.config", "ExportConfig"),
    "evaluate": ("fastdraft_hf.eval.config", "EvaluateConfig"),
    "bench": ("fastdraft_hf.eval.config", "BenchConfig"),
    "card": ("fastdraft_hf.recipe", "CardConfig"),
}


def _section(name: str) -> Any:
    import importlib

    if name not in _SECTIONS:
        return None
    module, attribute = _SECTIONS[name]
    return getattr(importlib.import_module(module), attribute)


def add_arguments(parser: argparse.ArgumentParser, name: str) -> None:
    parser.add_argument(
        "--config",
        type=Path,
        metavar="RECIPE.yaml",
        help="take it from a recipe; by default from the one in --output-dir, if any",
    )
    parser.add_argument("--target", metavar="ID", help="model id of the Hub, or a folder")
    parser.add_argument("--output-dir", metavar="DIR", help="folder of the run")
    if name not in ("design", "generate"):  # --draft of generate is its setting
        parser.add_argument(
            "--draft", metavar="DIR", help="start from this draft instead of designing one"
        )
    parser.add_argument("--dry-run", action="store_true", help="print what would be done")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="further changes to the recipe"
    )
    section = _section(name)
    if section is None:
        return
    add_fields(parser, section, f"settings of {name}")


def recipe_of(args: argparse.Namespace, *, known: bool = True) -> Recipe:
    """Return the recipe that a stage's arguments name and change.

    Args:
        args: of `add_arguments`.
        known: whether the recipe that ``--output-dir`` was last filled by is taken up again.
    """
    from fastdraft_hf._errors import FastDraftError
    from fastdraft_hf.recipe import build_recipe, read_recipe
    from fastdraft_hf.stages.runner import RECIPE

    name = args.command
    overrides = list(args.overrides)
    for key, value in (("target", args.target), ("output_dir", args.output_dir)):
        if value is not None:
            overrides.append(f"{key}={value}")
    draft = getattr(args, "draft", None)
    if draft is not None:
        overrides.append(f"design.draft={draft}")
    for key, value in vars(args).items():
        if key.startswith("field_") and value is not None:
            overrides.append(f"{name}.{key.removeprefix('field_')}={value}")
    if args.config is not None:
        return read_recipe(args.config, overrides)
    if args.output_dir is None:
        raise FastDraftError(f"{name}: give --config RECIPE.yaml, or --target and --output-dir")
    recipe_file = Path(args.output_dir) / RECIPE
    if known and recipe_file.exists():
        return read_recipe(recipe_file, overrides)
    return build_recipe({}, overrides)


def run(args: argparse.Namespace) -> None:
    from fastdraft_hf.cli._running import run_stages

    recipe, name = recipe_of(args), args.command
    stages = [name]
    if getattr(args, "draft", None) is not None:
        # Without a training run before it, a stage makes what it reads from the given draft.
        stages = ["design", "export", name] if name == "bench" else ["design", name]
        if recipe.reduced_vocabulary is not None and name in ("export", "bench"):
            stages.append("reduced_vocabulary")
    run_stages(recipe, stages, args.dry_run)
    if name == "evaluate" and not args.dry_run:
        _print_results(Path(recipe.output_dir))


def _print_results(folder: Path) -> None:
    """Print what is known of a finished evaluation, also of one that was finished before."""
    import json

    from fastdraft_hf.eval.terminal import print_evaluation

    path = folder / "evaluate" / "results.json"
    if path.exists():
        print_evaluation(json.loads(path.read_text(encoding="utf-8")))
