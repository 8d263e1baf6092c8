"""``fastdraft trim``: a trained draft with a head of the most frequent tokens only."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser, name: str) -> None:
    parser.add_argument("--draft", metavar="DIR", type=Path, required=True, help="a trained draft")
    parser.add_argument("--target", metavar="ID", required=True, help="model id, or a folder")
    parser.add_argument(
        "--rows",
        metavar="DIR",
        type=Path,
        nargs="+",
        required=True,
        help="sets that the target wrote (generate/NAME of a run)",
    )
    parser.add_argument(
        "--draft-vocab",
        metavar="COUNT",
        default="8192",
        help="tokens that the head scores (default: 8192)",
    )
    parser.add_argument(
        "--output-dir", metavar="DIR", type=Path, required=True, help="the folder to make"
    )
    parser.add_argument(
        "--texts",
        type=int,
        default=24,
        help="held-out texts to measure the cost in acceptance on; 0 for none (default: 24)",
    )


def run(args: argparse.Namespace) -> None:
    from fastdraft_hf._errors import FastDraftError
    from fastdraft_hf._schema import parse_count
    from fastdraft_hf.cli._running import quiet_libraries
    from fastdraft_hf.pipeline.provenance import describe
    from fastdraft_hf.targets.resolve import resolve_target
    from fastdraft_hf.tuning.trim import sentences, trim_head

    try:
        size = parse_count(args.draft_vocab)
    except ValueError as error:
        raise FastDraftError(f"draft_vocab: {error}") from None
    if args.texts < 0:
        raise FastDraftError(f"texts: must be at least 0, got {args.texts}")
    quiet_libraries()
    facts = trim_head(
        args.draft,
        args.rows,
        size,
        args.output_dir,
        target=resolve_target(args.target).path,
        texts=args.texts,
        provenance=describe(draft=str(args.draft)),
    )
    for line in sentences(facts):
        print(line)
    print(f"written to {args.output_dir}")
