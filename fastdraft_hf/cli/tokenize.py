"""``fastdraft tokenize``: the text of PT and CP as token shards, before any training."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

_STAGES = ("pretrain", "continue")


def add_arguments(parser: argparse.ArgumentParser, name: str) -> None:
    parser.description = (
        "Tokenise the sources of pretrain and continue into tokens_dir, as much as their budgets "
        "need. Runs that name the same tokens_dir read it instead of the text."
    )
    parser.add_argument("--config", type=Path, metavar="RECIPE.yaml", help="take it from a recipe")
    parser.add_argument("--target", metavar="ID", help="model id of the Hub, or a folder")
    parser.add_argument("--sources", metavar="LIST", help="as in a recipe, instead of one; YAML")
    parser.add_argument("--max-train-tokens", metavar="N", help="how much of them, such as 5B")
    parser.add_argument("--tokens-dir", metavar="DIR", help="where the shards go, or are")
    parser.add_argument(
        "--processes", type=int, metavar="N", help="that tokenise (default: one a core)"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="further changes to the recipe"
    )


def run(args: argparse.Namespace) -> None:
    from fastdraft_hf._errors import FastDraftError
    from fastdraft_hf.recipe import build_recipe, read_recipe
    from fastdraft_hf.stages.runner import Run

    if args.processes is not None and args.processes < 1:
        raise FastDraftError(f"--processes: must be at least 1, got {args.processes}")
    overrides = list(args.overrides)
    if args.target is not None:
        overrides.append(f"target={args.target}")
    if args.sources is not None:
        overrides.append(f"pretrain.sources={args.sources}")
    if args.max_train_tokens is not None:
        overrides.append(f"pretrain.max_train_tokens={args.max_train_tokens}")
    data: dict[str, Any] = {}
    if args.config is None and args.sources is None:
        raise FastDraftError("tokenize: give --config RECIPE.yaml, or --sources")
    recipe = read_recipe(args.config, overrides) if args.config else build_recipe(data, overrides)
    if args.tokens_dir is not None:
        for name in recipe.training_stages():
            if name in _STAGES:
                overrides += [f"{name}.tokens_dir={args.tokens_dir}", f"{name}.streaming=false"]
        recipe = (
            read_recipe(args.config, overrides) if args.config else build_recipe(data, overrides)
        )
    stages = {n: s for n, s in recipe.training_stages().items() if n in _STAGES}
    if not stages:
        raise FastDraftError("tokenize: the recipe has neither pretrain nor continue")
    for name, stage in stages.items():
        if stage.tokens_dir is None:
            raise FastDraftError(f"{name}.tokens_dir: not set; give --tokens-dir DIR")
        if all(source.kind == "generated" for source in stage.sources):
            raise FastDraftError(
                f"{name}.sources: generated sets are token ids already; nothing to tokenise"
            )
    _tokenize(Run(recipe, Path(recipe.output_dir)), stages, args.processes)


def _tokenize(run: Any, stages: dict[str, Any], processes: int | None) -> None:
    import tempfile

    from transformers import AutoTokenizer

    from fastdraft_hf.cli._running import quiet_libraries
    from fastdraft_hf.data.decontaminate import Decontaminator
    from fastdraft_hf.data.mixture import summary_lines
    from fastdraft_hf.data.sources import summary_keys
    from fastdraft_hf.stages.train import tokenize_stage

    quiet_libraries()
    tokenizer = AutoTokenizer.from_pretrained(run.target.path)
    check = Decontaminator.of_task_sets(run.recipe.evaluate.tasks, run.recipe.bench.tasks)
    for name, stage in stages.items():
        sources = [source for source in stage.sources if source.kind != "generated"]
        # The budget's share of the generated sets is not asked of the others.
        kept = sum(source.weight for source in sources)
        share = kept / sum(source.weight for source in stage.sources)
        budget = max(stage.step_tokens, round(stage.max_train_tokens * share))
        section = stage.model_copy(update={"sources": sources, "max_train_tokens": budget})
        with tempfile.TemporaryDirectory() as unused:
            shards = tokenize_stage(
                run, name, section, tokenizer, check, own=Path(unused), processes=processes
            )
        facts = {key: s.facts() for key, s in zip(summary_keys(sources), shards, strict=True)}
        for line, one in zip(summary_lines(facts), shards, strict=True):
            print(f"{name}: {line}; in {one.folder}")
