"""``fastdraft push DIR --repo-id user/name`` and ``fastdraft pull user/name [DIR]``."""

import argparse
import sys
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser, name: str) -> None:
    add = parser.add_argument
    if name == "pull":
        add("repo_id", metavar="USER/NAME", help="the draft's repository")
        add("folder", type=Path, nargs="?", metavar="DIR", help="where to (default: Hub's cache)")
        add("--revision", help="branch, tag or commit")
        return
    add("folder", type=Path, metavar="DIR", help="a run's folder, or a draft's")
    add("--repo-id", metavar="USER/NAME", help="the draft's repository on the Hub")
    add(
        "--to-folder",
        type=Path,
        metavar="FOLDER",
        help="write the repository's files here and send nothing; the card then loads the draft "
        "from --repo-id (default: the last two parts of FOLDER)",
    )
    add(
        "--dtype",
        choices=["bfloat16", "float16", "float32"],
        help="store the weights in this type (default: as they are)",
    )
    add("--openvino", action="store_true", help="also push the draft's OpenVINO folders")
    add("--private", action="store_true", help="make new repositories private")
    add("--revision", metavar="BRANCH", help="branch to commit to (default: main)")
    add("--overwrite", action="store_true", help="replace what the repository or FOLDER holds")
    add("--dry-run", action="store_true", help="list the files and end; the Hub is not reached")


def run(args: argparse.Namespace) -> None:
    import tempfile

    from fastdraft_hf._atomic import room_to_write
    from fastdraft_hf._errors import FastDraftError
    from fastdraft_hf.hub.folder import files_below, gather, replace_folder
    from fastdraft_hf.hub.push import pull, push

    if args.command == "pull":
        print(pull(args.repo_id, args.folder, args.revision))
        return
    to_folder = args.to_folder and args.to_folder.absolute()
    if args.repo_id is None and to_folder is None:
        raise FastDraftError("push: give --repo-id USER/NAME, or --to-folder FOLDER")
    if to_folder is not None and (args.private or args.revision):
        raise FastDraftError("--to-folder: --private and --revision are for the Hub")
    if to_folder is not None and to_folder.exists() and not args.overwrite:
        raise FastDraftError(f"{to_folder} exists; replace it with --overwrite")
    repo_id = args.repo_id or "/".join(to_folder.parts[-2:])
    if to_folder is not None:
        to_folder.parent.mkdir(parents=True, exist_ok=True)
    beside = None if to_folder is None else to_folder.parent
    with (
        room_to_write(beside or Path(tempfile.gettempdir())),
        tempfile.TemporaryDirectory(prefix=".fastdraft-push-", dir=beside) as scratch,
    ):
        files = Path(scratch) / "draft"
        files.mkdir()
        gather(args.folder, repo_id, files, openvino=args.openvino, dtype=args.dtype)
        for path, file in files_below(files).items():
            print(f"  {file.stat().st_size:>12,}  {path}", file=sys.stderr)
        if args.dry_run:
            return
        if to_folder is not None:
            replace_folder(files, to_folder)
            print(to_folder)
            return
        given = {"private": args.private, "revision": args.revision, "overwrite": args.overwrite}
        print(push(files, repo_id, **given))
