"""``fastdraft evaluate`` and ``bench``: measure any draft with any target, outside a run."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from fastdraft_hf.cli.schema import settings_text

if TYPE_CHECKING:
    from fastdraft_hf._config import Section

# What each command runs on the draft.
_STAGES = {"evaluate": ["design", "evaluate"], "bench": ["design", "export", "bench"]}


def _section(name: str) -> type[Section]:
    from fastdraft_hf.eval.config import BenchConfig, EvaluateConfig

    return EvaluateConfig if name == "evaluate" else BenchConfig


def add_arguments(parser: argparse.ArgumentParser, name: str) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description += f" In a run: fastdraft run RECIPE --stages {name}."  # type: ignore[operator]
    parser.epilog = settings_text(_section(name))
    add = parser.add_argument
    add("--target", metavar="ID", required=True, help="model id, folder or embedded:NAME")
    add("--draft", metavar="DIR", required=True, help="folder of a draft or of a run, or an id")
    add("--output-dir", metavar="DIR", help="folder of the results (default: runs/TARGET/DRAFT)")
    if name == "bench":
        from fastdraft_hf.eval.config import SERVERS

        add("--engine", choices=SERVERS, help="a server, instead of this process")
        add("--server", metavar="URL", help="the engine's server that was started with the draft")
        add("--server-alone", metavar="URL", help="and one with the target alone")
    add("--dry-run", action="store_true", help="print the settings and the stages, run nothing")
    add(
        "overrides",
        nargs="*",
        metavar="setting=value",
        help="settings below, or keys of a recipe such as seed=1 or device=cpu",
    )


def run(args: argparse.Namespace) -> None:
    from fastdraft_hf.cli.demo import find_draft
    from fastdraft_hf.cli.run import run_stages
    from fastdraft_hf.decode.settings import read_draft_tokens
    from fastdraft_hf.hub.folder import chat_mode
    from fastdraft_hf.recipe import build_recipe
    from fastdraft_hf.target.resolve import folder_name

    name, draft = args.command, find_draft(args.draft)
    folder = Path("runs", folder_name(args.target), "-".join(draft.resolve().parts[-2:]))
    own = _section(name).model_fields
    words = list(args.overrides)
    if getattr(args, "engine", None):
        gamma = read_draft_tokens(draft) or 3  # a setting that was given comes later
        words = [f"paths=[{args.engine}]", f"num_assistant_tokens=[{gamma}]", *words]
        for key in ("server", "server_alone"):
            if url := getattr(args, key):
                words.append(f"{key}={url}")
    recipe = build_recipe(
        {
            "target": args.target,
            "output_dir": args.output_dir or str(folder),
            "design": {"draft": str(draft)},
            "chat_template_kwargs": chat_mode(draft),
        },
        # `gammas=[3]` is evaluate.gammas; a key with another first part is the recipe's.
        [f"{name}.{word}" if word.split("=")[0].split(".")[0] in own else word for word in words],
    )
    if not any("openvino" in path for path in recipe.bench.paths):
        nothing = recipe.export.model_copy(update={"openvino": []})
        recipe = recipe.model_copy(update={"export": nothing})
    run_stages(recipe, _STAGES[name], args.dry_run)
