"""``fastdraft run RECIPE.yaml|RUN|--target ID [--stages a,b] [--dry-run] [key=value ...]``."""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from fastdraft_hf._atomic import read_json
from fastdraft_hf._errors import FastDraftError
from fastdraft_hf._processes import is_main, stop

if TYPE_CHECKING:
    from fastdraft_hf.recipe import Recipe
    from fastdraft_hf.stages.run import Run

_EPILOG = """\
fastdraft run --target ORG/MODEL --hours 3
fastdraft run recipes/smollm2-135m/quickstart.yaml
fastdraft run RECIPE.yaml --stages design,generate align.learning_rate=2e-3
fastdraft run runs/mine --stages evaluate evaluate.num_assistant_tokens=5    the recipe of that run
fastdraft run --stages design target=ID output_dir=runs/mine design.params=50M

In several processes, the same recipe:
torchrun --nproc_per_node 8 recipes/run.py RECIPE.yaml

The settings of a stage: fastdraft schema STAGE
"""


def add_arguments(parser: argparse.ArgumentParser, name: str) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _EPILOG
    add_recipe_arguments(parser)
    parser.add_argument("--stages", metavar="a,b", help="only these stages (default: all)")
    parser.add_argument(
        "--dry-run", action="store_true", help="print the recipe and its stages, run nothing"
    )


def add_recipe_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what names a recipe: for ``run`` and ``plan``."""
    parser.add_argument(
        "recipe",
        nargs="?",
        metavar="RECIPE",
        help="a recipe file, or the folder of a run; without it, all settings are defaults",
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="changes to the recipe, such as align.learning_rate=2e-3 or output_dir=runs/second",
    )
    parser.add_argument(
        "--target", metavar="ORG/MODEL", help="instead of a recipe: recipes/any.yaml for this model"
    )
    parser.add_argument(
        "--params", help="with --target: size of the draft, such as 50M (default: by the target's)"
    )
    parser.add_argument(
        "--hours",
        type=float,
        help="the recipe's max_hours (with --target: 3): time for the whole run; work is cut",
    )


def recipe_of(args: argparse.Namespace, *overrides: str) -> Recipe:
    """Return the recipe that the arguments name; ``overrides`` come before theirs."""
    source, own = args.recipe, args.overrides
    if source is not None and "=" in source and not Path(source).exists():
        source, own = None, [source, *own]
    hours = [] if args.hours is None else [f"max_hours={args.hours}"]
    overrides = (*overrides, *hours, *own)
    if args.target is not None:
        if source is not None:
            raise FastDraftError(f"--target: takes the place of a recipe; leave out {source}")
        return general_recipe(args.target, args.params, args.hours, overrides)
    if args.params is not None:
        raise FastDraftError("--params belongs to --target")
    if source is None and not (hours or own):
        raise FastDraftError(
            "give --target ORG/MODEL, a recipe file, the folder of a run, or settings such as "
            "target=ID output_dir=DIR"
        )
    return _read(source, overrides)


def run(args: argparse.Namespace) -> None:
    started = time.monotonic()
    recipe = recipe_of(args)
    stages = [s.strip() for s in args.stages.split(",") if s.strip()] if args.stages else None
    run_stages(recipe, stages, args.dry_run, started)


def general_recipe(
    target: str, params: str | None, hours: float | None, overrides: Sequence[str]
) -> Recipe:
    """Return recipes/any.yaml for a target; more hours than its own raise its rows and tokens.

    A target without a chat template for Magpie gets code and free text only, none of it greedy: of
    Gemma-3-270M's rows 92% looped at temperature 0, 49% at 0.6 and 17% at 0.8.
    """
    from fastdraft_hf._config import parse_count
    from fastdraft_hf.data.prompts import template_ends
    from fastdraft_hf.recipe import build_recipe
    from fastdraft_hf.target.resolve import folder_name, load_tokenizer, resolve_target

    checkout = Path(__file__).resolve().parents[2] / "recipes" / "any.yaml"
    packaged = Path(__file__).with_name("any.yaml")
    file = packaged if packaged.exists() else checkout
    data = yaml.safe_load(file.read_text(encoding="utf-8"))
    data |= {"target": target, "output_dir": f"runs/{folder_name(target)}"}
    if params is not None:
        data["design"] = {"params": params}
    sets = data["generate"]["sets"]
    tokenizer = load_tokenizer(resolve_target(target, weights=False).path, "target")
    try:
        template_ends(tokenizer)
    except FastDraftError as error:
        print(f"no set of instructions: {error}", file=sys.stderr)
        del sets["chat"]
        sets["code"]["temperatures"] = sets["text"]["temperatures"]
        data["align"]["sources"] = [{"kind": "generated", "name": name} for name in sets]
    more = max(1.0, (hours or 0.0) / data["max_hours"])
    for section in (*sets.values(), *(s for s in data.values() if isinstance(s, dict))):
        for key in {"rows", "max_train_tokens"} & section.keys():
            section[key] = int(more * parse_count(str(section[key])))
    return build_recipe(data, overrides)


def _read(source: str | None, overrides: Sequence[str]) -> Recipe:
    from fastdraft_hf.recipe import build_recipe, read_recipe
    from fastdraft_hf.stages.run import RECIPE

    if source is None:
        return build_recipe({}, overrides)
    path = Path(source)
    if not path.is_dir():
        return read_recipe(path, overrides)
    if not (path / RECIPE).is_file():
        raise FastDraftError(f"{path} is not the folder of a run: it holds no {RECIPE}")
    return read_recipe(path / RECIPE, [f"output_dir={path}", *overrides])


def run_stages(
    recipe: Recipe, wanted: Sequence[str] | None, dry_run: bool, started: float | None = None
) -> None:
    """Print the resolved recipe and run its stages, or say what would be run.

    The results of a wanted ``evaluate`` or ``bench`` are printed at the end, also of one that was
    finished.
    """
    from fastdraft_hf.eval.summary import print_bench, print_evaluation
    from fastdraft_hf.stages.run import Run
    from fastdraft_hf.stages.runner import choose, execute

    started = started or time.monotonic()
    run = Run(recipe, Path(recipe.output_dir), dry=dry_run, started=started)
    stages = choose(recipe, wanted)
    run.left_out = _unmeasurable(run, stages, wanted is not None)
    stages = [name for name in stages if name not in run.left_out]
    quiet_libraries()
    if is_main():
        _check(run, stages, dry_run)
        _print_plan(run, stages)
    if dry_run:
        return
    execute(run, stages)
    stop()
    for name, show in (("evaluate", print_evaluation), ("bench", print_bench)):
        if is_main() and name in (wanted or ()):
            show(read_json(run.stage_folder(name) / "results.json"))


def _unmeasurable(run: Run, stages: list[str], wanted: bool) -> list[str]:
    """Return the stages that decode with a draft, if the target's cache does not allow it."""
    from fastdraft_hf.decode.obstacles import cannot_roll_back
    from fastdraft_hf.target.resolve import load_config

    try:
        config = load_config(run.look_at_target().path, "target")
    except FastDraftError:  # reported where the target is used
        return []
    if not cannot_roll_back(config):
        return []
    named = [name for name in stages if name in ("evaluate", "bench")]
    reason = (
        f"target: layers of family '{config.model_type}' keep a state from which rejected tokens "
        f"cannot be taken back, so there is no {' and no '.join(named)} here; measure the draft "
        "in the engine that serves it"
    )
    if wanted and named:
        raise FastDraftError(reason)
    if named and is_main():
        print(reason, file=sys.stderr)
    return ["evaluate", "bench"]


def _print_plan(run: Run, stages: Sequence[str]) -> None:
    from fastdraft_hf.stages.design import preview
    from fastdraft_hf.stages.runner import grows

    print(yaml.safe_dump(run.recipe.resolved(), sort_keys=False), end="", flush=True)
    print(f"\n{run.folder}:", file=sys.stderr)
    for name in stages:
        started = run.partial_folder(name).exists()
        state = "finished" if run.finished(name) else "started" if started else "to do"
        if grows(run, name):
            state = "to extend"
        print(f"  {name:<10} {state:<9} {run.stage_folder(name)}", file=sys.stderr)
    if "design" in stages and run.recipe.design.draft is None and not run.finished("design"):
        print(preview(run), file=sys.stderr)


def _check(run: Run, stages: Sequence[str], dry_run: bool) -> None:
    """Refuse what would stop the run late, before any work."""
    from fastdraft_hf.stages import reduced_vocabulary
    from fastdraft_hf.target.resolve import check_name

    check_name(run.recipe.target)
    for name, section in run.recipe.training_stages().items():
        if name in stages:
            try:  # what transformers or TRL refuse
                section.trainer_config("unused", seed=run.recipe.seed, device="cpu")
            except FastDraftError as error:
                raise FastDraftError(f"{name}.{error}") from None
    to_do = any(not run.finished(name) for name in stages)
    if to_do and Path(run.recipe.target).expanduser().is_dir():  # nothing to download
        _ = run.target  # checks its files
    name = "reduced_vocabulary"
    if name in stages and not dry_run and not run.finished(name):
        reduced_vocabulary.check(run)


def quiet_libraries() -> None:
    """Leave the terminal to our own progress bars and messages."""
    import warnings

    import datasets
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    datasets.disable_progress_bars()
    logging.getLogger("trl").setLevel(logging.ERROR)
    # TRL warns at import that parts of it are experimental; a user of ours cannot act on that.
    warnings.filterwarnings("ignore", module="trl")
