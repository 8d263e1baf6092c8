"""Does a draft that samples sharper than its target pay? Ratios of temperatures, compared.

    python benchmarks/draft_temperature.py [--draft DIR] [--target DIR] [--prompts 10]

The target answers every prompt once per temperature, and both models read the answer
(`fastdraft_hf.eval.expected`): the expected acceptance of the same texts at every ratio, without
the noise of decoding. The acceptance of one drafted token is compared with that at ratio 1, paired
by prompt, with 95% bootstrap intervals. `fastdraft run` chooses the ratio by itself, on rows held
out from align.
"""

from __future__ import annotations

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastdraft_hf import embedded_target, load_draft
from fastdraft_hf._progress import Progress
from fastdraft_hf.decode.assisted import decode
from fastdraft_hf.eval.expected import Continuation, text_acceptance
from fastdraft_hf.eval.metrics import bootstrap
from fastdraft_hf.eval.prompts import draw_prompts
from fastdraft_hf.hub.card import describe_machine
from fastdraft_hf.stages.provenance import machine


def mean(texts: list[tuple[float, ...]]) -> float:
    return sum(map(sum, texts)) / sum(map(len, texts))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", default=str(embedded_target()))
    parser.add_argument("--draft", default="model_cards/SmolLM2-135M-Instruct-FastDraft")
    parser.add_argument("--tasks", nargs="+", default=["humaneval", "ifbench"])
    parser.add_argument("--prompts", type=int, default=10)
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.3, 0.6, 1.0])
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.7, 0.8, 0.9, 1.1])
    args = parser.parse_args()

    target = AutoModelForCausalLM.from_pretrained(args.target, dtype=torch.float32).eval()
    draft = load_draft(args.draft, dtype=torch.float32).eval()
    prompts = draw_prompts(
        AutoTokenizer.from_pretrained(args.target), args.tasks, args.prompts, 600, 1
    )
    found: dict[tuple[str, float, float], list[tuple[float, ...]]] = {}
    with Progress("read", len(prompts) * len(args.temperatures), "answers") as progress:
        for number, prompt in enumerate(prompts):
            for temperature in args.temperatures:
                record = decode(
                    target,
                    prompt.ids,
                    max_new_tokens=args.max_new_tokens,
                    temperature=temperature,
                    seed=number,
                )
                text = Continuation(prompt.task, prompt.ids, tuple(record.tokens))
                for ratio in (1.0, *args.ratios):
                    read = text_acceptance(target, draft, text, temperature, (), ratio)
                    found.setdefault((prompt.task, temperature, ratio), []).append(read.alphas)
                progress.advance(1)
    print(describe_machine(machine()))
    print("| tasks | T | ratio | acceptance of a token | over ratio 1 |\n|---|---|---|---|---|")
    for (task, temperature, ratio), alphas in found.items():
        pairs = list(zip(alphas, found[task, temperature, 1.0], strict=True))
        gain = bootstrap(
            pairs, lambda some: mean([a for a, _ in some]) / mean([b for _, b in some])
        )
        print(
            f"| {task} | {temperature:g} | {ratio:g} | {mean(alphas):.3f} | {gain.value:.3f} "
            f"({gain.low:.3f}-{gain.high:.3f}) |"
        )


if __name__ == "__main__":
    main()
