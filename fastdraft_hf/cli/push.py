"""``fastdraft push DIR --repo user/name``: a draft to the Hub, in one commit."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser, name: str) -> None:
    parser.add_argument("folder", type=Path, metavar="DIR", help="a run's folder, or a draft's")
    parser.add_argument(
        "--repo", required=True, metavar="USER/NAME", help="the draft's repository on the Hub"
    )
    parser.add_argument(
        "--private", action="store_true", help="make new repositories private; old ones stay as is"
    )
    parser.add_argument(
        "--dataset", metavar="USER/NAME", help="also push what the target wrote, to this dataset"
    )
    parser.add_argument(
        "--openvino", action="store_true", help="also push the draft's OpenVINO folders"
    )
    parser.add_argument("--revision", metavar="BRANCH", help="branch to commit to (default: main)")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace what a repository of that name holds"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print what would be sent; the Hub is not asked"
    )


def run(args: argparse.Namespace) -> None:
    from fastdraft_hf.hub.push import plan_push, push

    plans = plan_push(args.folder, args.repo, dataset=args.dataset, openvino=args.openvino)
    for plan in plans:
        print(f"{plan.repo_type} {plan.repo}, {plan.size / 1e6:.1f} MB:", file=sys.stderr)
        for file in plan.files:
            print(f"  {file.size:>12,}  {file.path}", file=sys.stderr)
    if args.dry_run:
        return
    pages = push(plans, private=args.private, revision=args.revision, overwrite=args.overwrite)
    print("\n".join(pages))
