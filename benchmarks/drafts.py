"""Compare several drafts of one target by expected acceptance, prompt by prompt.

    python benchmarks/drafts.py DRAFT OTHER ... [--average 0.5] [--prompts 60] [--skip 20]

The target completes held-out prompts of HumanEval and IFBench once at T = 0.6, and every draft
reads the completions: the expected, teacher-forced acceptance rate at γ = 3, with 95% bootstrap
intervals over prompts; differences to the first draft are paired by prompt. `--average s` also
reads the average of each other draft with the first, with a share s of the first
(`align.start_weight`). `--skip n` leaves out the first n prompts of each set, which stage evaluate
uses, so that a choice made here is not evaluated on the same prompts.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from alignment_data import GAMMA, TEMPERATURE, rate_gain, rounds
from objectives import _show, held_out_answers, interval
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastdraft_hf.cli.run import quiet_libraries
from fastdraft_hf.eval.metrics import acceptance_rate, block_efficiency
from fastdraft_hf.eval.prompts import draw_prompts
from fastdraft_hf.hub.card import describe_machine
from fastdraft_hf.recipe import build_recipe
from fastdraft_hf.stages.provenance import machine
from fastdraft_hf.target.resolve import resolve_target, stop_ids

# The longest answer of `held_out_answers`.
TOKENS = 64


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def averaged(first: Path, other: Path, share: float) -> Any:
    """Return ``share`` of the first draft's weights and the rest of the other's."""
    model, start = load(other), load(first).state_dict()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.lerp_(start[name], share)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("drafts", type=Path, nargs="+", help="folders; the first is compared with")
    parser.add_argument("--target", default="embedded:smollm2-135m-instruct")
    parser.add_argument("--average", type=float, help="share of the first draft, such as 0.5")
    parser.add_argument("--prompts", type=int, default=60, help="of each set")
    parser.add_argument("--skip", type=int, default=20, help="prompts of each set left out")
    args = parser.parse_args()
    if missing := [d for d in args.drafts if not (d / "config.json").is_file()]:
        parser.error(f"{missing[0]} is not the folder of a draft")
    quiet_libraries()
    recipe = build_recipe({"target": args.target})
    folder = resolve_target(args.target).path
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tasks = ["humaneval", "ifbench"]
    prompts = []
    for task in tasks:
        drawn = draw_prompts(tokenizer, [task], args.skip + args.prompts, 400, recipe.seed)
        prompts += drawn[args.skip :]
    texts = [text for text in held_out_answers(recipe, folder, prompts) if text.ids]
    target, ends = load(folder), stop_ids(folder, tokenizer)
    models = {str(draft): (lambda d=draft: load(d)) for draft in args.drafts}
    if args.average is not None:
        for other in args.drafts[1:]:
            label = f"{args.average:g} first + {1 - args.average:g} {other}"
            models[label] = lambda o=other: averaged(args.drafts[0], o, args.average)
    found = {
        label: rounds(target, make(), texts, ends, label, TOKENS) for label, make in models.items()
    }
    first = found[str(args.drafts[0])]
    print(f"\nexpected acceptance rate, γ = {GAMMA}, T = {TEMPERATURE}\n")
    print("| draft | task set | prompts | acceptance rate | difference | block efficiency |")
    print("|---|---|---|---|---|---|")
    for label, rows in found.items():
        for task in tasks:
            own = [row for row, text in zip(rows, texts, strict=True) if text.task == task]
            base = [row for row, text in zip(first, texts, strict=True) if text.task == task]
            rate = _show(interval(own, acceptance_rate))
            pairs = list(zip(own, base, strict=True))
            change = "" if rows is first else _show(interval(pairs, rate_gain), "+.3f")
            print(
                f"| {label} | {task} | {len(own)} | {rate} | {change} "
                f"| {block_efficiency(own):.2f} |"
            )
    print(f"\n{describe_machine(machine())}")


if __name__ == "__main__":
    main()
