"""``fastdraft audit``: is what an engine samples with a draft distributed as the target's own?"""

from __future__ import annotations

import argparse

from fastdraft_hf._errors import FastDraftError


def add_arguments(parser: argparse.ArgumentParser, name: str) -> None:
    from fastdraft_hf.eval.config import AUDITED

    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = """\
Two tokens after a few prompts are sampled many times at temperature 1 in float32, with the target
alone and with the draft, and their counts are tested against the target's exact probabilities
(chi-square). The exit status is 1 if they are distributed otherwise.

For vLLM and llama.cpp start the engine in float32, with the draft or without, or twice:
  fastdraft audit --target T --draft D --engine vllm --server http://127.0.0.1:8000
"""
    add = parser.add_argument
    add("--target", metavar="ID", required=True, help="model id, folder or embedded:NAME")
    add("--draft", metavar="DIR", required=True, help="folder of a draft or of a run, or an id")
    add(
        "--engine",
        default="ours",
        choices=AUDITED,
        help="default: our loop in PyTorch; openvino is GenAI",
    )
    add("--num-assistant-tokens", type=int, default=3, metavar="N", help="γ (3); not of a server")
    add(
        "--distance",
        type=float,
        default=0.02,
        help="total variation that nine of ten audits find (0.02); half takes four times as long",
    )
    add("--server", metavar="URL", help="vLLM or llama.cpp, started with the draft")
    add("--server-alone", metavar="URL", help="the same engine with the target alone")


def run(args: argparse.Namespace) -> int:
    from fastdraft_hf.cli.demo import find_draft
    from fastdraft_hf.cli.run import quiet_libraries
    from fastdraft_hf.draft.reduced_vocabulary import load_draft
    from fastdraft_hf.eval.audit import LEVEL, PROMPTS, audit, open_sampler, samples_needed
    from fastdraft_hf.eval.config import SERVERS
    from fastdraft_hf.export.openvino import require_openvino
    from fastdraft_hf.target.resolve import load_tokenizer, resolve_target

    needs_server = args.engine in SERVERS
    if needs_server != any((args.server, args.server_alone)):
        raise FastDraftError(
            "--server: engines vllm and llama.cpp need it, or --server-alone; no other does"
        )
    if not 0.001 <= args.distance <= 0.5:
        raise FastDraftError(f"--distance: must be from 0.001 to 0.5, got {args.distance:g}")
    if args.num_assistant_tokens < 1:
        raise FastDraftError("--num-assistant-tokens: must be at least 1")
    if "openvino" in args.engine:
        require_openvino()
    draft = find_draft(args.draft)
    quiet_libraries()
    target = resolve_target(args.target).path
    tokenizer = load_tokenizer(target, "--target")
    prompts = [tokenizer(text)["input_ids"] for text in PROMPTS]
    exact = load_draft(target, dtype="float32").eval()
    samples = samples_needed(args.distance)
    print(f"{samples:,} samples find a total variation of {args.distance:g}")
    failed = False
    for name, used, url in (
        ("the target alone", None, args.server_alone),
        (f"with the draft, γ = {args.num_assistant_tokens}", draft, args.server),
    ):
        if needs_server and url is None:
            continue
        sample = open_sampler(args.engine, target, used, args.num_assistant_tokens, url)
        found = audit(exact, sample, prompts, samples, f"{args.engine}, {name}")
        print(
            f"{args.engine}, {name}: total variation {found.distance:.4f} (chance alone: "
            f"{found.by_chance:.4f}), p = {found.p_value:.2g}: "
            f"{'as the target' if found.passed else f'NOT as the target (p < {LEVEL:g})'}",
            flush=True,
        )
        failed |= not found.passed
    return int(failed)
