"""``fastdraft tune TARGET [setting=value …]``: the best draft shape and γ on this machine."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser, name: str) -> None:
    from fastdraft_hf.cli.schema import settings_text
    from fastdraft_hf.tune.config import TuneConfig

    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = settings_text(TuneConfig)
    add = parser.add_argument
    add("target", metavar="TARGET", help="model id, folder or embedded:NAME")
    add(
        "overrides",
        nargs="*",
        metavar="setting=value",
        help="such as params=12M measure=openvino 'acceptance={1: 0.33, 4: 0.42}'",
    )
    add(
        "--output-dir",
        metavar="DIR",
        type=Path,
        default=Path("runs/tune"),
        help="folder of timings and results (default: runs/tune)",
    )


def run(args: argparse.Namespace) -> None:
    """Search; print the findings to standard error and the recipe's sections to standard output."""
    import sys

    from fastdraft_hf._atomic import room_to_write
    from fastdraft_hf.cli.run import quiet_libraries
    from fastdraft_hf.eval.summary import print_table
    from fastdraft_hf.recipe import split_override
    from fastdraft_hf.target.resolve import resolve_target
    from fastdraft_hf.tune.config import TuneConfig
    from fastdraft_hf.tune.search import recipe_snippet, search, table, verdict

    config = TuneConfig(**dict(map(split_override, args.overrides)))
    quiet_libraries()
    with room_to_write(args.output_dir):
        results = search(config, resolve_target(args.target), args.output_dir)
    print_table(table(results))
    print(f"\n{verdict(results)}", file=sys.stderr)
    print(recipe_snippet(results), end="")
