"""``fastdraft vocabulary TARGET DRAFT``: may the one draft for the other?"""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser, name: str) -> None:
    parser.description = (
        "Compare two vocabularies id by id, with padded rows, special tokens and the ids that end "
        "a turn. No weights are read. The exit status is 1 when they differ."
    )
    for what in ("target", "draft"):
        parser.add_argument(what, metavar=what.upper(), help="model id of the Hub, or a folder")


def run(args: argparse.Namespace) -> int:
    from fastdraft_hf.draft.vocabulary import Vocabulary, compare_vocabularies
    from fastdraft_hf.eval.terminal import print_table
    from fastdraft_hf.target.resolve import resolve_target

    read = [
        Vocabulary.of_folder(resolve_target(name, weights=False).path, name)
        for name in (args.target, args.draft)
    ]
    report = compare_vocabularies(*read)
    print_table(report.rows())
    print(f"\n{report.verdict}")
    for problem in report.problems():
        print(f"- {problem}")
    print(report.conclusion())
    return int(report.verdict == "different")
