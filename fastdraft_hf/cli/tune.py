"""``fastdraft tune``: the best draft shape and γ on this machine."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastdraft_hf.tune.config import TuneConfig


def add_arguments(parser: argparse.ArgumentParser, name: str) -> None:
    from fastdraft_hf.cli._fields import add_fields
    from fastdraft_hf.tune.config import TuneConfig

    parser.add_argument("--target", metavar="ID", required=True, help="model id, or a folder")
    parser.add_argument(
        "--output-dir", metavar="DIR", type=Path, default=Path("runs/tune"), help="what it keeps"
    )
    parser.add_argument(
        "--write", metavar="RECIPE.yaml", type=Path, help="put the best design and γ into a recipe"
    )
    add_fields(parser, TuneConfig, "settings of tune")


def run(args: argparse.Namespace) -> None:
    from fastdraft_hf.cli._fields import read_fields
    from fastdraft_hf.tune.config import TuneConfig

    tune(read_fields(args, TuneConfig), args.target, args.output_dir, args.write)


def tune(config: TuneConfig, target: str, output_dir: Path, recipe: Path | None = None) -> None:
    """Search, print what was found, and put it into ``recipe`` if one is given."""
    import sys

    from fastdraft_hf.cli._running import quiet_libraries
    from fastdraft_hf.eval.terminal import print_table
    from fastdraft_hf.target.resolve import resolve_target
    from fastdraft_hf.tune import terminal
    from fastdraft_hf.tune.figures import draw
    from fastdraft_hf.tune.search import search

    if recipe is not None:
        _written(recipe, target, {})  # a recipe that cannot be read is said at once
    quiet_libraries()
    results = search(config, resolve_target(target), output_dir)
    figures = draw(results, output_dir / "figures")
    print_table(terminal.design_rows(results))
    print("", file=sys.stderr)
    print_table(terminal.target_rows(results))
    print("", file=sys.stderr)
    for line in terminal.verdict(results):
        print(line, file=sys.stderr)
    print(f"figures: {', '.join(map(str, figures))}", file=sys.stderr)
    if recipe is None:
        print(terminal.recipe_lines(results), end="")
        return
    from fastdraft_hf._atomic import write_text

    changes = {
        "design": results["best"]["section"],
        "bench": terminal.bench_section(results),
    }
    write_text(recipe, _written(recipe, target, changes))
    print(f"written into {recipe}", file=sys.stderr)


def _written(path: Path, target: str, changes: dict[str, Any]) -> str:
    """Return the recipe's text with the changes, after reading it as a recipe."""
    import tempfile

    import yaml

    from fastdraft_hf._errors import FastDraftError
    from fastdraft_hf.recipe import read_recipe
    from fastdraft_hf.tune.recipe_text import set_values

    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        text = str(yaml.safe_dump({"target": target}))
    except OSError as error:
        raise FastDraftError(f"{path}: {error.strerror}") from error
    text = set_values(text, changes)
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / path.name
        copy.write_text(text, encoding="utf-8")
        try:
            read_recipe(copy, [])
        except FastDraftError as error:
            raise FastDraftError(f"{path}: {error}") from None
    return text
