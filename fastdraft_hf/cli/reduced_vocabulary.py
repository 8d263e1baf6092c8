"""``fastdraft trim``: a trained draft with a head of the most frequent tokens only.

With ``--rows`` it takes any draft and any sets and needs no run; without, it is the stage of a run
like every other (`cli.stage`).
"""

from __future__ import annotations

import argparse
from pathlib import Path

from fastdraft_hf.cli import stage

_DESCRIPTION = """\
fastdraft trim --draft DIR --target ID --rows SET [SET ...] --output-dir DIR [--draft-vocab 8192]
    trim any draft, counting the tokens of any sets that the target wrote
fastdraft trim --config RECIPE.yaml | --output-dir RUN
    the stage of a run
"""


def add_arguments(parser: argparse.ArgumentParser, name: str) -> None:
    stage.add_arguments(parser, name)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = _DESCRIPTION
    parser.add_argument(
        "--rows",
        metavar="SET",
        type=Path,
        nargs="+",
        help="without a run: sets that the target wrote (generate/NAME of a run)",
    )


def run(args: argparse.Namespace) -> None:
    if args.rows is None:
        stage.run(args)
    else:
        _trim(args)


def _trim(args: argparse.Namespace) -> None:
    from fastdraft_hf._errors import FastDraftError
    from fastdraft_hf.cli._fields import read_fields
    from fastdraft_hf.cli._running import quiet_libraries
    from fastdraft_hf.stages.provenance import describe
    from fastdraft_hf.target.resolve import resolve_target
    from fastdraft_hf.tune.config import ReducedVocabularyConfig
    from fastdraft_hf.tune.reduced_vocabulary import reduce_head, sentences

    if args.config is not None or args.overrides:
        raise FastDraftError(
            "rows: with a recipe the sets are reduced_vocabulary.sets; leave --rows out"
        )
    for option in ("draft", "target", "output_dir"):
        if getattr(args, option) is None:
            raise FastDraftError(f"{option}: needed with --rows (--{option.replace('_', '-')})")
    config = read_fields(args, ReducedVocabularyConfig)
    if config.sets:
        raise FastDraftError("sets: they are a run's; --rows has folders instead")
    output = Path(args.output_dir)
    if args.dry_run:
        print(output)
        return
    quiet_libraries()
    facts = reduce_head(
        Path(args.draft),
        args.rows,
        config.draft_vocab_size,
        output,
        target=resolve_target(args.target).path,
        texts=config.texts,
        provenance=describe(draft=args.draft),
    )
    for line in sentences(facts):
        print(line)
    print(f"written to {output}")
