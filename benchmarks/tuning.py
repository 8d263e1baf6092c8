"""Whether the speeds that `fastdraft tune` predicts come true.

    python benchmarks/tuning.py --draft DIR [--only pytorch,openvino] [--target ID]

It predicts the tokens per second of a trained draft as `fastdraft tune` does, from timed
rounds of our loop and from the acceptance on other HumanEval prompts. Then it decodes prompts
through the real path (`generate` with `assisted_decoding`, over PyTorch and over OpenVINO int8) and
compares. It prints two errors: of the whole prediction, and of the times alone, with the block
efficiency of the timed run. Speeds are after the first round, which reads the prompt.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastdraft_hf import load_draft
from fastdraft_hf.decode.assisted import decode
from fastdraft_hf.decode.records import DecodingRecord
from fastdraft_hf.eval.metrics import (
    acceptance_of_rate,
    acceptance_rate,
    bootstrap,
    expected_block_efficiency,
)
from fastdraft_hf.eval.prompts import EvaluationPrompt, draw_prompts
from fastdraft_hf.export.openvino import cached_openvino
from fastdraft_hf.hub.card import describe_machine
from fastdraft_hf.stages.provenance import machine
from fastdraft_hf.target.resolve import resolve_target
from fastdraft_hf.tune.timing import LoopTimer

MEASURES = {"pytorch": "cpu", "openvino": "openvino", "cuda": "cuda"}


class Engine:
    """Target and draft of one runtime, decoding through our loop."""

    def __init__(self, name: str, target: Path, draft: Path) -> None:
        self.measure = MEASURES[name]
        self.target_folder, self.draft_folder = target, draft
        if name == "openvino":
            from optimum.intel import OVModelForCausalLM

            self.target_folder = cached_openvino(target, "int8")
            self.draft_folder = cached_openvino(draft, "int8")
            self._target = OVModelForCausalLM.from_pretrained(self.target_folder)
            self._draft = OVModelForCausalLM.from_pretrained(self.draft_folder)
        else:
            dtype = torch.bfloat16 if name == "cuda" else torch.float32
            model = AutoModelForCausalLM.from_pretrained(target, dtype=dtype)
            self._target = model.to(self.measure).eval()
            self._draft = load_draft(draft, dtype=dtype).to(self.measure).eval()

    def decode(self, prompt: EvaluationPrompt, gamma: int, new: int) -> DecodingRecord:
        return decode(
            self._target,
            prompt.ids,
            task=prompt.task,
            key=prompt.key,
            max_new_tokens=new,
            draft=self._draft,
            num_assistant_tokens=gamma,
            path="ours",
        )


def speed_after_the_prompt(records: Sequence[DecodingRecord]) -> float:
    """Return tokens per second of all rounds but the first."""
    tokens = sum(r.new_tokens - r.rounds[0][1] - 1 for r in records)
    return tokens / sum(r.seconds - (r.first_token_seconds or 0.0) for r in records)


def observed(records: Sequence[DecodingRecord]) -> float:
    """Return the block efficiency of all rounds but the first."""
    tokens = sum(r.new_tokens - r.rounds[0][1] - 1 for r in records)
    return tokens / sum(len(r.rounds) - 1 for r in records)


def prediction(args: argparse.Namespace, name: str, prompts: list[EvaluationPrompt]) -> None:
    target = resolve_target(args.target).path
    engine = Engine(name, target, args.draft)
    others, prompts = prompts[: args.calibration], prompts[args.calibration :]
    known = [engine.decode(p, args.gamma, args.new) for p in others]
    alpha = acceptance_of_rate(acceptance_rate(known), args.gamma)
    context = round(statistics.mean(len(p.ids) for p in prompts)) + args.new // 2
    timer = LoopTimer(engine.target_folder, engine.measure, args.gammas, context, args.rounds)
    found: dict[int, list[DecodingRecord]] = {gamma: [] for gamma in args.gammas}
    for gamma in args.gammas:
        engine.decode(prompts[0], gamma, args.new)  # warms up
    rounds: dict[int, list[float]] = {gamma: [] for gamma in args.gammas}
    for repeat in range(args.repeats):
        # In turn with the answers, so that a drift of the machine's speed affects both.
        for gamma, times in timer.measure(engine.draft_folder, repeat).items():
            rounds[gamma] += times
        for prompt in prompts:
            for gamma in args.gammas if repeat % 2 == 0 else args.gammas[::-1]:
                found[gamma].append(engine.decode(prompt, gamma, args.new))
    print(
        f"α {alpha:.3f}, from {len(others)} other prompts at γ = {args.gamma}\n\n"
        " γ  predicted  measured (95%)           error  times alone  block efficiency"
    )
    for gamma, records in found.items():
        seconds = statistics.median(rounds[gamma])
        predicted = expected_block_efficiency(alpha, gamma) / seconds
        measured = bootstrap(records, speed_after_the_prompt)
        efficiency = observed(records)
        given = efficiency / seconds
        spread = f"{measured.value:.1f} ({measured.low:.1f} to {measured.high:.1f})"
        print(
            f"{gamma:>2}  {predicted:>9.1f}  {spread:<23}  {predicted / measured.value - 1:+.1%}  "
            f"{given / measured.value - 1:>+11.1%}  {efficiency:.2f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", default="embedded:smollm2-135m-instruct")
    parser.add_argument("--draft", type=Path, required=True, help="the trained draft's folder")
    parser.add_argument("--only", default="pytorch,openvino", help="of pytorch, cuda, openvino")
    parser.add_argument("--prompts", type=int, default=8, help="HumanEval prompts that are timed")
    parser.add_argument("--calibration", type=int, default=8, help="others, for the acceptance")
    parser.add_argument("--new", type=int, default=64, help="new tokens at most")
    parser.add_argument("--gamma", type=int, default=3, help="γ of the calibration")
    parser.add_argument("--gammas", type=int, nargs="+", default=[1, 2, 3, 5])
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds of each γ per repeat")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(resolve_target(args.target).path)
    print(f"{describe_machine(machine())}, {torch.get_num_threads()} threads of PyTorch")
    for name in args.only.split(","):
        print(f"\n== {name}")
        count = args.calibration + args.prompts
        prediction(args, name, draw_prompts(tokenizer, ["humaneval"], count, 300, 0))


if __name__ == "__main__":
    main()
