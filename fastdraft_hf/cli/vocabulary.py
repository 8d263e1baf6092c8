"""``fastdraft vocabulary TARGET DRAFT``: compare two vocabularies."""

import argparse


def add_arguments(parser: argparse.ArgumentParser, name: str) -> None:
    parser.description = (
        "Compare two vocabularies id by id, with padded rows and special tokens. No "
        "weights are read. The exit status is 1 when they differ."
    )
    for what in ("target", "draft"):
        parser.add_argument(what, metavar=what.upper(), help="model id on the Hub, or a folder")


def run(args: argparse.Namespace) -> int:
    from fastdraft_hf.draft.vocabulary import CONCLUSIONS, Vocabulary, compare_vocabularies
    from fastdraft_hf.target.resolve import resolve_target

    read = [
        Vocabulary.of_folder(resolve_target(name, weights=False, key=key).path, name)
        for key, name in (("target", args.target), ("draft", args.draft))
    ]
    report = compare_vocabularies(*read)
    for one in read:
        rows = f"{one.rows:,}" if one.rows else "unknown"
        print(f"{one.name}: {len(one.ids):,} tokens, {rows} rows")
    print(f"ids that agree: {report.agreeing:,}; that differ: {report.differing:,}")
    print(f"\n{report.verdict}")
    for problem in report.problems:
        print(f"- {problem}")
    print(CONCLUSIONS[report.verdict])
    return int(report.verdict == "different")
