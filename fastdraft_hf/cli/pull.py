"""``fastdraft pull user/name [DIR]``: a draft from the Hub."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser, name: str) -> None:
    parser.add_argument("repo_id", metavar="USER/NAME", help="the draft's repository on the Hub")
    parser.add_argument(
        "folder", type=Path, nargs="?", metavar="DIR", help="where to (default: the Hub's cache)"
    )
    parser.add_argument("--revision", help="branch, tag or commit")


def run(args: argparse.Namespace) -> None:
    from fastdraft_hf.hub.pull import pull_draft

    print(pull_draft(args.repo_id, args.folder, args.revision))
