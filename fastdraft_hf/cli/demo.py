"""``fastdraft demo``: prompts answered with and without the draft, side by side."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser, name: str) -> None:
    add = parser.add_argument
    add("--prompt", metavar="TEXT", help="what to answer (default: four prompts of the package)")
    add("--target", metavar="ID", default="embedded:smollm2-135m-instruct", help="id or folder")
    add("--draft", metavar="DIR", help="folder of a draft or run, or an id (default: shipped)")
    add("--engine", choices=("openvino", "transformers"), help="default: openvino if installed")
    add("--num-assistant-tokens", type=int, metavar="N", help="tokens drafted per round (γ)")
    add("--max-new-tokens", type=int, default=128, metavar="N", help="longest answer (128)")


def run(args: argparse.Namespace) -> None:
    """Find and check both models, load them, and print what they write."""
    from fastdraft_hf._errors import FastDraftError
    from fastdraft_hf._extras import openvino_available
    from fastdraft_hf.cli._running import quiet_libraries
    from fastdraft_hf.decode.settings import read_draft_tokens
    from fastdraft_hf.draft.vocabulary import Vocabulary, check_vocabulary
    from fastdraft_hf.eval import demo
    from fastdraft_hf.eval.bench import Setting
    from fastdraft_hf.eval.engines import Models, load_engine
    from fastdraft_hf.export.openvino import cached_openvino, require_openvino
    from fastdraft_hf.recipe import resolve_device
    from fastdraft_hf.target.resolve import resolve_target, stop_ids

    for key in ("max_new_tokens", "num_assistant_tokens"):
        if (value := getattr(args, key)) is not None and value < 1:
            raise FastDraftError(f"{key}: must be at least 1, got {value}")
    if args.prompt is not None and not args.prompt.strip():
        raise FastDraftError("prompt: it is empty")
    device = resolve_device("auto")
    if args.engine == "openvino":
        require_openvino()
    openvino = args.engine != "transformers" and device == "cpu" and openvino_available()
    draft = find_draft(args.draft)
    quiet_libraries()
    target = resolve_target(args.target).path

    from rich.console import Console
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(target, trust_remote_code=False)
    check_vocabulary(Vocabulary.of_folder(target, "the target", tokenizer), draft, "draft")
    gamma = args.num_assistant_tokens or read_draft_tokens(draft) or 3  # the paper's
    hint = " (the first time, OpenVINO exports them)" if openvino else ""
    print(f"loading both models{hint} ...", file=sys.stderr, flush=True)
    models = Models(
        target=str(target),
        drafts={"": str(draft)},
        target_openvino=str(cached_openvino(target, "int8")) if openvino else None,
        drafts_openvino={"": str(cached_openvino(draft, "int8"))} if openvino else {},
        device=device,
        stop_ids=sorted(stop_ids(target, tokenizer)),
    )
    path = "ours-openvino" if openvino else "ours"
    engine = load_engine(models, [Setting(path), Setting(path, "", gamma)])
    how = "OpenVINO int8" if openvino else f"PyTorch on {device}"
    print(f"{how}, greedy, {gamma} tokens drafted per round (γ)", flush=True)
    prompts = demo.PROMPTS if args.prompt is None else [("chat", args.prompt)]
    demo.show(engine, prompts, tokenizer, Console(), path, gamma, args.max_new_tokens)


def find_draft(given: str | None) -> Path:
    """Return the draft's folder: the shipped one, that of a run, or of any model."""
    from fastdraft_hf._errors import FastDraftError
    from fastdraft_hf.eval.demo import shipped_draft
    from fastdraft_hf.target.resolve import resolve_target

    if given is None:
        return shipped_draft()
    of_run = Path(given).expanduser() / "draft"  # stage card's folder
    try:
        return resolve_target(str(of_run) if of_run.is_dir() else given).path
    except FastDraftError as error:
        raise FastDraftError(f"draft: {str(error).removeprefix('target: ')}") from None
