"""``fastdraft push DIR --repo-id user/name``: a draft to the Hub or into a folder."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser, name: str) -> None:
    parser.add_argument("folder", type=Path, metavar="DIR", help="a run's folder, or a draft's")
    parser.add_argument("--repo-id", metavar="USER/NAME", help="the draft's repository on the Hub")
    parser.add_argument(
        "--to-folder",
        type=Path,
        metavar="FOLDER",
        help="write the repository's files here and send nothing; the card then loads the draft "
        "from --repo-id (default: the last two parts of FOLDER)",
    )
    parser.add_argument(
        "--dtype",
        choices=["bfloat16", "float16", "float32"],
        help="store the weights in this type (default: as they are)",
    )
    parser.add_argument(
        "--target",
        metavar="ID",
        help="with --dtype: measure with this target what rounding costs in acceptance",
    )
    parser.add_argument(
        "--openvino", action="store_true", help="also push the draft's OpenVINO folders"
    )
    parser.add_argument("--private", action="store_true", help="make new repositories private")
    parser.add_argument("--revision", metavar="BRANCH", help="branch to commit to (default: main)")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace what the repository or FOLDER holds"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="list the files and end; the Hub is not reached"
    )


def run(args: argparse.Namespace) -> None:
    import tempfile

    from fastdraft_hf._errors import FastDraftError
    from fastdraft_hf.hub.folder import write_folder
    from fastdraft_hf.hub.push import push
    from fastdraft_hf.stages.publishing import prepare

    to_folder = args.to_folder
    if args.repo_id is None and to_folder is None:
        raise FastDraftError("push: give --repo-id USER/NAME, or --to-folder FOLDER")
    if to_folder is not None and (args.private or args.revision):
        raise FastDraftError("--to-folder: --private and --revision are for the Hub")
    if args.target is not None and args.dtype is None:
        raise FastDraftError("--target: needs --dtype")
    if to_folder is not None and to_folder.exists() and not args.overwrite:
        raise FastDraftError(f"{to_folder} exists; replace it with --overwrite")
    repo_id = args.repo_id or "/".join(to_folder.resolve().parts[-2:])
    with tempfile.TemporaryDirectory(prefix="fastdraft-push-") as scratch:
        files = prepare(
            args.folder,
            repo_id,
            Path(scratch),
            openvino=args.openvino,
            dtype=args.dtype,
            target=None if args.dry_run else args.target,
        )
        for path, content in sorted(files.items()):
            size = len(content) if isinstance(content, bytes) else content.stat().st_size
            print(f"  {size:>12,}  {path}", file=sys.stderr)
        if args.dry_run:
            return
        if to_folder is not None:
            write_folder(files, to_folder)
            print(to_folder)
        else:
            print(
                push(
                    files,
                    repo_id,
                    private=args.private,
                    revision=args.revision,
                    overwrite=args.overwrite,
                )
            )
