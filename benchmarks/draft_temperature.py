"""Does a draft that samples sharper than its target pay? Ratios of temperatures, compared.

    python benchmarks/draft_temperature.py [--draft DIR] [--target DIR] [--prompts 10]

Every prompt is answered at every ratio in turn, in one process. The target's texts have the same
distribution at all of them, but are other texts, so compare means. Block efficiency is tokens per
pass of the target, acceptance rate accepted per drafted token; 95% bootstrap intervals over
prompts. `fastdraft run` chooses the ratio by itself, on rows held out from align.
"""

from __future__ import annotations

import argparse
from collections import defaultdict

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastdraft_hf import embedded_target, load_draft
from fastdraft_hf._progress import Progress
from fastdraft_hf.decode.assisted import decode
from fastdraft_hf.decode.records import DecodingRecord
from fastdraft_hf.decode.settings import TEMPERATURE_RATIO
from fastdraft_hf.eval.metrics import acceptance_rate, block_efficiency, bootstrap
from fastdraft_hf.eval.prompts import draw_prompts
from fastdraft_hf.hub.card import describe_machine
from fastdraft_hf.stages.provenance import machine


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", default=str(embedded_target()))
    parser.add_argument("--draft", default="model_cards/SmolLM2-135M-Instruct-FastDraft")
    parser.add_argument("--tasks", nargs="+", default=["humaneval", "ifbench"])
    parser.add_argument("--prompts", type=int, default=10)
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.6, 1.0])
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.7, 0.8, 0.9, 1.0])
    parser.add_argument("--gammas", type=int, nargs="+", default=[3, 5])
    args = parser.parse_args()

    target = AutoModelForCausalLM.from_pretrained(args.target, dtype=torch.float32).eval()
    draft = load_draft(args.draft, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.target)
    prompts = draw_prompts(tokenizer, args.tasks, args.prompts, 600, 1)
    records: dict[tuple[str, float, int, float], list[DecodingRecord]] = defaultdict(list)
    ways = [(t, g, r) for t in args.temperatures for g in args.gammas for r in args.ratios]
    with Progress("decode", len(prompts) * len(ways), "answers") as progress:
        for number, prompt in enumerate(prompts):
            for temperature, gamma, ratio in ways:
                setattr(draft.generation_config, TEMPERATURE_RATIO, ratio)
                record = decode(
                    target,
                    prompt.ids,
                    task=prompt.task,
                    key=prompt.key,
                    max_new_tokens=args.max_new_tokens,
                    temperature=temperature,
                    seed=number,
                    draft=draft,
                    num_assistant_tokens=gamma,
                    path="ours",
                )
                records[prompt.task, temperature, gamma, ratio].append(record)
                progress.advance(1)
    print(describe_machine(machine()))
    print(
        "| tasks | T | γ | ratio | acceptance rate | block efficiency |\n|---|---|---|---|---|---|"
    )
    for (task, temperature, gamma, ratio), found in records.items():
        rate, tokens = bootstrap(found, acceptance_rate), bootstrap(found, block_efficiency)
        print(
            f"| {task} | {temperature:g} | {gamma} | {ratio:g} | {rate.value:.3f} "
            f"({rate.low:.3f}-{rate.high:.3f}) | {tokens.value:.2f} "
            f"({tokens.low:.2f}-{tokens.high:.2f}) |"
        )


if __name__ == "__main__":
    main()
