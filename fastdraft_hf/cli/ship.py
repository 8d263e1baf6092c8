"""``fastdraft ship DIR --to FOLDER``: a draft into a folder of a repository, in bfloat16."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser, name: str) -> None:
    parser.add_argument("folder", type=Path, metavar="DIR", help="a run's folder, or a draft's")
    parser.add_argument(
        "--to", type=Path, required=True, metavar="FOLDER", help="the folder to make"
    )
    parser.add_argument(
        "--max-megabytes",
        type=float,
        default=25.0,
        metavar="N",
        help="largest size of the weights, in millions of bytes (default: 25)",
    )
    parser.add_argument(
        "--target", metavar="ID", help="what the draft is checked with (default: the run's target)"
    )
    parser.add_argument(
        "--repo",
        metavar="NAME",
        help="what the card loads the draft from: a repository of the Hub, or a folder (default: "
        "the last two parts of FOLDER)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the folder")
    parser.add_argument(
        "--no-check",
        action="store_true",
        help="do not let the target write text with the rounded draft",
    )


def run(args: argparse.Namespace) -> None:
    from fastdraft_hf.cli._running import quiet_libraries
    from fastdraft_hf.stages.shipping import ship

    quiet_libraries()
    shipped = ship(
        args.folder,
        args.to,
        target=args.target,
        repo=args.repo,
        max_megabytes=args.max_megabytes,
        overwrite=args.overwrite,
        check=not args.no_check,
    )
    print("\n".join(shipped.lines()))
