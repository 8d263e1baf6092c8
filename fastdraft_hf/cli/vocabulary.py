"""``fastdraft vocabulary TARGET DRAFT``: compare two vocabularies, or reduce the draft's."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser, name: str) -> None:
    parser.description = (
        "Compare two vocabularies id by id, with padded rows, special tokens and end ids. No "
        "weights are read. The exit status is 1 when they differ. With --reduce, write a copy of "
        "the draft whose head scores only the most frequent tokens; in a run, stage "
        "reduced_vocabulary does this."
    )
    add = parser.add_argument
    for what in ("target", "draft"):
        add(what, metavar=what.upper(), help="model id on the Hub, or a folder")
    add("--reduce", metavar="N", help="tokens that the head keeps, such as 8192 or 16k")
    add(
        "--sets",
        metavar="SET",
        type=Path,
        nargs="+",
        help="with --reduce: generated sets whose tokens are counted (generate/NAME of a run)",
    )
    add("--output", metavar="DIR", type=Path, help="with --reduce: folder to make")


def run(args: argparse.Namespace) -> int:
    from fastdraft_hf._errors import FastDraftError
    from fastdraft_hf.draft.vocabulary import CONCLUSIONS, Vocabulary, compare_vocabularies
    from fastdraft_hf.target.resolve import resolve_target

    if args.reduce is not None:
        return _reduce(args)
    if args.sets is not None or args.output is not None:
        raise FastDraftError("vocabulary: --sets and --output need --reduce N")
    read = [
        Vocabulary.of_folder(resolve_target(name, weights=False, key=key).path, name)
        for key, name in (("target", args.target), ("draft", args.draft))
    ]
    report = compare_vocabularies(*read)
    for one in read:
        rows = f"{one.rows:,}" if one.rows else "unknown"
        print(f"{one.name}: {len(one.ids):,} tokens, {rows} rows, ends on {one.named_ends()}")
    print(f"ids that agree: {report.agreeing:,}; that differ: {report.differing:,}")
    print(f"\n{report.verdict}")
    for problem in report.problems:
        print(f"- {problem}")
    print(CONCLUSIONS[report.verdict])
    return int(report.verdict == "different")


def _reduce(args: argparse.Namespace) -> int:
    from fastdraft_hf._atomic import atomic_folder, write_json
    from fastdraft_hf._errors import FastDraftError
    from fastdraft_hf.cli.run import quiet_libraries
    from fastdraft_hf.draft.config import ReducedVocabularyConfig
    from fastdraft_hf.stages.provenance import describe
    from fastdraft_hf.stages.reduced_vocabulary import reduce_draft, sentence
    from fastdraft_hf.target.resolve import resolve_target

    size = ReducedVocabularyConfig(draft_vocab_size=args.reduce).draft_vocab_size
    for option in ("sets", "output"):
        if getattr(args, option) is None:
            raise FastDraftError(f"vocabulary: --reduce needs --{option}")
    if args.output.exists():
        raise FastDraftError(f"{args.output} exists; move it away or give another --output")
    quiet_libraries()
    draft, target = resolve_target(args.draft, key="draft").path, resolve_target(args.target).path
    with atomic_folder(args.output) as folder:
        facts = reduce_draft(draft, args.sets, size, folder, target=target)
        write_json(folder / "provenance.json", describe(draft=args.draft, facts=facts))
    print(f"{sentence(facts)}\nwritten to {args.output}")
    return 0
