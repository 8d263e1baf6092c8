"""``fastdraft tune TARGET [setting=value …]``: the best draft shape and γ on this machine."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser, name: str) -> None:
    from fastdraft_hf.tune.config import TuneConfig

    lines = [f"  {key:<26}{field.description}" for key, field in TuneConfig.model_fields.items()]
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = "\n".join(["settings:", *lines])
    parser.add_argument("target", metavar="TARGET", help="model id, folder or embedded:NAME")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="setting=value",
        help="such as params=12M measure=openvino 'acceptance={1: 0.33, 4: 0.42}'",
    )
    parser.add_argument(
        "--output-dir",
        metavar="DIR",
        type=Path,
        default=Path("runs/tune"),
        help="folder of timings, results and the figure (default: runs/tune)",
    )


def run(args: argparse.Namespace) -> None:
    """Search; print the findings to standard error and the recipe's sections to standard output."""
    import sys

    import yaml

    from fastdraft_hf._errors import FastDraftError
    from fastdraft_hf.cli._running import quiet_libraries
    from fastdraft_hf.eval.summary import print_table
    from fastdraft_hf.target.resolve import resolve_target
    from fastdraft_hf.tune.config import TuneConfig
    from fastdraft_hf.tune.search import draw, recipe_snippet, search, table, verdict

    settings = {}
    for word in args.overrides:
        key, equals, value = word.partition("=")
        if not equals:
            raise FastDraftError(f"'{word}' is not setting=value, such as params=12M")
        try:
            settings[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise FastDraftError(f"{key}: '{value}' is not a valid YAML value") from error
    quiet_libraries()
    output_dir = args.output_dir
    results = search(TuneConfig(**settings), resolve_target(args.target), output_dir)
    print_table(table(results))
    draw(results, output_dir / "tune.png")
    lines = [*verdict(results), f"figure: {output_dir / 'tune.png'}"]
    print("", *lines, sep="\n", file=sys.stderr)
    print(recipe_snippet(results), end="")
