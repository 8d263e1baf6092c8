"""``fastdraft demo``: a prompt answered side by side, with and without the draft."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastdraft_hf.eval.demo.config import DemoConfig


def add_arguments(parser: argparse.ArgumentParser, name: str) -> None:
    from fastdraft_hf.cli._fields import add_fields
    from fastdraft_hf.eval.demo.config import DemoConfig

    parser.add_argument(
        "--prompt", metavar="TEXT", help="what to answer; by default four prompts of the package"
    )
    add_fields(parser, DemoConfig, "settings of demo")


def run(args: argparse.Namespace) -> None:
    from fastdraft_hf.cli._fields import read_fields
    from fastdraft_hf.eval.demo.config import DemoConfig

    demo(read_fields(args, DemoConfig), args.prompt)


def demo(config: DemoConfig, prompt: str | None = None) -> None:
    """Find and check both models, load them, and show what they write."""
    from fastdraft_hf._errors import FastDraftError
    from fastdraft_hf.cli._running import quiet_libraries
    from fastdraft_hf.eval.demo.engine import check_draft, choose_engine, load_engine
    from fastdraft_hf.eval.demo.prompts import PROMPTS, DemoPrompt
    from fastdraft_hf.recipe import resolve_device
    from fastdraft_hf.target.resolve import resolve_target

    if prompt is not None and not prompt.strip():
        raise FastDraftError("prompt: it is empty")
    device = resolve_device("auto")
    name = choose_engine(config.engine, device)
    draft, exported = _draft(config.draft)
    quiet_libraries()
    target = resolve_target(config.target).path

    from rich.console import Console
    from transformers import AutoTokenizer

    from fastdraft_hf.eval.demo.show import show
    from fastdraft_hf.stages.target_engine import stop_ids

    tokenizer = AutoTokenizer.from_pretrained(target, trust_remote_code=False)
    check_draft(target, tokenizer, draft)
    engine = load_engine(
        name,
        target,
        draft,
        tokenizer,
        config,
        ends=stop_ids(target, tokenizer),
        device=device,
        exported=exported,
        busy=_busy,
    )
    # One's own words are an instruction; --chat false gives them as they are.
    prompts = PROMPTS if prompt is None else (DemoPrompt("a prompt", prompt, "instruction"),)
    show(engine, prompts, config, Console())


def _draft(given: str | None) -> tuple[Path, Path | None]:
    """Return the draft's folder and, where its run made one, its OpenVINO export."""
    from fastdraft_hf._errors import FastDraftError
    from fastdraft_hf.eval.demo.engine import WEIGHT_FORMAT, shipped_draft
    from fastdraft_hf.hub.run_folder import find_run
    from fastdraft_hf.target.resolve import resolve_target

    if given is None:
        return shipped_draft(), None
    folder = Path(given).expanduser()
    if not folder.is_dir():
        try:
            return resolve_target(given).path, None
        except FastDraftError as error:
            raise FastDraftError(f"draft: {str(error).removeprefix('target: ')}") from None
    found = find_run(folder)
    if found.draft is None:
        raise FastDraftError(
            f"draft: {folder} holds no finished draft yet; run `fastdraft card --output-dir "
            f"{folder}`, or give the folder of one of its stages"
        )
    exports = [f for f in found.openvino_folders() if f.name == f"openvino-{WEIGHT_FORMAT}"]
    return found.draft, exports[0] if exports else None


@contextlib.contextmanager
def _busy(label: str) -> Iterator[None]:
    """Show a spinner while something takes a while; a log gets the line alone."""
    from rich.console import Console

    console = Console(stderr=True)
    if console.is_terminal:
        with console.status(label):
            yield
    else:
        print(f"{label} ...", file=sys.stderr, flush=True)
        yield
