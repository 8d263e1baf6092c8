"""``fastdraft card [DIR]``: the stage, or the card of a run's folder rendered anew."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from fastdraft_hf.cli import stage


def add_arguments(parser: argparse.ArgumentParser, name: str) -> None:
    stage.add_arguments(parser, name)
    parser.usage = (
        "fastdraft card DIR [--output FILE]\n       fastdraft card [options] [key=value ...]"
    )
    parser.description = (
        "Assemble the draft's folder with its model card; with DIR, render the card of that run "
        "from its records and print it, or write it to FILE."
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="with DIR: write the card here")


def run(args: argparse.Namespace) -> None:
    from fastdraft_hf._errors import FastDraftError

    folders = [word for word in args.overrides if "=" not in word]
    if not folders:
        if args.output is not None:
            raise FastDraftError("card: --output needs DIR")
        stage.run(args)
        return
    if len(folders) > 1 or args.config or args.output_dir or len(args.overrides) > 1:
        raise FastDraftError("card: with DIR there is only --output")
    _render(Path(folders[0]), args.output)


def _render(folder: Path, output: Path | None) -> None:
    from fastdraft_hf._atomic import write_text
    from fastdraft_hf.hub.card import OpenVINOCopy
    from fastdraft_hf.hub.run_folder import card_of_run, find_run

    found = find_run(folder)
    exported = found.openvino_folders()
    card = card_of_run(
        found,
        draft_location=str((found.draft or folder / "draft").resolve()),
        openvino=OpenVINOCopy(exported[0].name, str(exported[0].resolve())) if exported else None,
    )
    if output is None:
        print(card.content)
        return
    write_text(output, str(card.content))
    print(f"card: {output}", file=sys.stderr)
