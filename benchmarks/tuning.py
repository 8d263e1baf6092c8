"""Whether predicted speeds come true, and what a reduced vocabulary saves.

    python benchmarks/tuning.py --draft DIR [--only pytorch,openvino] [--target ID]
    python benchmarks/tuning.py --trim --draft DIR --reduced DIR [--only pytorch,openvino]

The first predicts tokens a second of a trained draft as `fastdraft tune` does: from timed rounds
of our loop, and from the acceptance that was measured, untimed, on other HumanEval prompts. Then it
decodes prompts through the real path (`generate` with `assisted_decoding`, over PyTorch and over
OpenVINO int8) and compares. Two errors are printed: of the whole prediction, and of the times
alone, when the block efficiency that the timed run had is put in. Speeds are after the first round,
which reads the prompt. The second times the passes of a draft with its whole head and of the same
reduced (`fastdraft trim`), in turn.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastdraft_hf import load_draft
from fastdraft_hf.decode.assisted import decode
from fastdraft_hf.decode.records import DecodingRecord
from fastdraft_hf.eval.metrics import acceptance_rate, bootstrap
from fastdraft_hf.eval.prompts import EvaluationPrompt, draw_prompts
from fastdraft_hf.export.openvino import cached_openvino
from fastdraft_hf.hub.card import describe_machine
from fastdraft_hf.stages.provenance import machine
from fastdraft_hf.target.resolve import resolve_target
from fastdraft_hf.tune.predict import Acceptance, RoundCost, acceptance_of_rate, predict
from fastdraft_hf.tune.timing import LoopTimer, Timing, median_and_quartiles, round_costs

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
            temperature=0.0,
            seed=0,
            draft=self._draft,
            num_assistant_tokens=gamma,
            path="ours",
        )


def speed_after_the_prompt(records: Sequence[DecodingRecord]) -> float:
    """Return tokens a second of all rounds but the first."""
    tokens = sum(r.new_tokens - r.rounds[0][1] - 1 for r in records)
    return tokens / sum(r.seconds - (r.first_token_seconds or 0.0) for r in records)


def observed(records: Sequence[DecodingRecord], gamma: int) -> tuple[float, float]:
    """Return block efficiency and share of whole blocks, of all rounds but the first."""
    rounds = [one for r in records for one in r.rounds[1:]]
    tokens = sum(r.new_tokens - r.rounds[0][1] - 1 for r in records)
    return tokens / len(rounds), sum(a == gamma for _, a in rounds) / len(rounds)


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
    timings: list[Timing] = []
    for repeat in range(args.repeats):
        # In turn with the answers, so that a drift of the machine's speed falls on both.
        timings.append(timer.measure(engine.draft_folder, 0))
        for prompt in prompts:
            for gamma in args.gammas if repeat % 2 == 0 else args.gammas[::-1]:
                found[gamma].append(engine.decode(prompt, gamma, args.new))
    cost = round_costs({"draft": timings}, pooled=True)["draft"]
    show_cost(cost)
    print(
        f"α {alpha:.3f}, from {len(others)} other prompts at γ = {args.gamma}\n\n"
        " γ  predicted  measured (95%)           error  times alone  block efficiency"
    )
    for gamma, records in found.items():
        predicted = predict(cost, Acceptance(alpha), gamma)
        measured = bootstrap(records, speed_after_the_prompt)
        efficiency, whole = observed(records, gamma)
        given = efficiency / cost.seconds(gamma, whole)
        spread = f"{measured.value:.1f} ({measured.low:.1f} to {measured.high:.1f})"
        print(
            f"{gamma:>2}  {predicted:>9.1f}  {spread:<23}  {predicted / measured.value - 1:+.1%}  "
            f"{given / measured.value - 1:>+11.1%}  {efficiency:.2f}"
        )


def show_cost(cost: RoundCost) -> None:
    ms = [f"{1e3 * seconds:.2f} ms" for seconds in (cost.first, cost.next, cost.catch_up)]
    print(f"draft's passes: first {ms[0]}, next {ms[1]}, catching up {ms[2]}")
    for what in ("verify", "outside"):
        times = getattr(cost, what)
        print(f"{what}: " + ", ".join(f"γ {g}: {1e3 * t:.2f} ms" for g, t in times.items()))


def reduced(args: argparse.Namespace, name: str) -> None:
    target = resolve_target(args.target).path
    folders = {"whole": args.draft, "reduced": args.reduced}
    if name == "openvino":
        target = cached_openvino(target, "int8")
        folders = {k: cached_openvino(v, "int8") for k, v in folders.items()}
    timer = LoopTimer(target, MEASURES[name], [3], 256, 8 * args.rounds)
    timings: dict[str, list[Timing]] = {k: [] for k in folders}
    for _ in range(args.repeats):
        for which, folder in folders.items():
            timings[which].append(timer.measure(folder, 0))
    for label, part in (("first pass", slice(1)), ("next passes", slice(1, None))):
        middle: dict[str, float] = {}
        for which, repeats in timings.items():
            times: list[Any] = [s for t in repeats for r in t.rounds for s in r.drafts[part]]
            one, low, high = (1e3 * t for t in median_and_quartiles(times))
            middle[which] = one
            print(f"{label}, {which} head: {one:.2f} ms (quartiles {low:.2f} to {high:.2f})")
        print(f"{label}: reduced / whole {middle['reduced'] / middle['whole']:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", default="embedded:smollm2-135m-instruct")
    parser.add_argument("--draft", type=Path, required=True, help="the trained draft's folder")
    parser.add_argument("--only", default="pytorch,openvino", help="of pytorch, cuda, openvino")
    parser.add_argument("--trim", action="store_true", help="time a reduced vocabulary")
    parser.add_argument("--reduced", type=Path, help="the same draft, reduced")
    parser.add_argument("--prompts", type=int, default=8, help="HumanEval prompts that are timed")
    parser.add_argument("--calibration", type=int, default=8, help="others, for the acceptance")
    parser.add_argument("--new", type=int, default=64, help="new tokens at most")
    parser.add_argument("--gamma", type=int, default=3, help="γ of the calibration")
    parser.add_argument("--gammas", type=int, nargs="+", default=[1, 2, 3, 5])
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds of each γ a repeat")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    if args.trim and args.reduced is None:
        parser.error("--trim needs --reduced DIR (fastdraft trim makes it)")
    tokenizer = AutoTokenizer.from_pretrained(resolve_target(args.target).path)
    print(f"{describe_machine(machine())}, {torch.get_num_threads()} threads of PyTorch")
    for name in args.only.split(","):
        print(f"\n== {name}")
        if args.trim:
            reduced(args, name)
        else:
            count = args.calibration + args.prompts
            prediction(args, name, draw_prompts(tokenizer, ["humaneval"], count, 300, 0))


if __name__ == "__main__":
    main()
