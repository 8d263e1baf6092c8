"""``fastdraft vocabulary TARGET DRAFT``: whether one model can draft for another."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser, name: str) -> None:
    parser.description = (
        "Compare two vocabularies id by id, with padded rows, special tokens and end ids. No "
        "weights are read. The exit status is 1 when they differ."
    )
    for what in ("target", "draft"):
        parser.add_argument(what, metavar=what.upper(), help="model id on the Hub, or a folder")


def run(args: argparse.Namespace) -> int:
    from fastdraft_hf.draft.vocabulary import Vocabulary, compare_vocabularies
    from fastdraft_hf.eval.terminal import print_table
    from fastdraft_hf.target.resolve import resolve_target

    read = [
        Vocabulary.of_folder(resolve_target(name, weights=False, key=key).path, name)
        for key, name in (("target", args.target), ("draft", args.draft))
    ]
    report = compare_vocabularies(*read)
    print_table(report.rows())
    print(f"\n{report.verdict}")
    for problem in report.problems():
        print(f"- {problem}")
    print(report.conclusion)
    return int(report.verdict == "different")
