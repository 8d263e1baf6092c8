"""Compare greedy output with a draft to the target alone, token for token, on every path.

    python benchmarks/lossless.py --draft runs/smollm2-from-nothing/align [--prompts 100]

Prompts are held-out ones of HumanEval and IFBench; prompt n is decoded with γ = n mod 8 + 1.
Everything is float32 (OpenVINO's weights, products and KV cache too), and each path is compared
with the target alone in the same engine. Where two outputs differ, the margin between the target's
first and second choice at that position shows whether two kernels rounded a tie differently or
something is wrong. Finished answers are kept in --work, and a killed run resumes. The exit status
is 1 if a difference is not a tie.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastdraft_hf._progress import Progress
from fastdraft_hf._ties import Margin, first_difference, greedy_margin
from fastdraft_hf.cli.run import quiet_libraries
from fastdraft_hf.decode.assisted import decode
from fastdraft_hf.decode.records import DecodingRecord
from fastdraft_hf.eval.journal import Journal
from fastdraft_hf.eval.metrics import acceptance_rate
from fastdraft_hf.eval.prompts import EvaluationPrompt, draw_prompts
from fastdraft_hf.export.openvino import cached_openvino, openvino_available
from fastdraft_hf.target.resolve import resolve_target, stop_ids

# Path -> its baseline, the target alone.
PATHS = {
    "transformers": "alone",
    "ours": "alone",
    "openvino": "openvino-alone",
    "ours-openvino": "ours-openvino-alone",
}
EXACT = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
# (prompt, γ) -> record
Run = Callable[[EvaluationPrompt, int], DecodingRecord]


def pytorch(target: Any, draft: Any, path: Any, tokens: int) -> Run:
    def run(prompt: EvaluationPrompt, gamma: int) -> DecodingRecord:
        return decode(
            target,
            prompt.ids,
            task=prompt.task,
            key=prompt.key,
            max_new_tokens=tokens,
            draft=draft,
            num_assistant_tokens=gamma,
            path=path,
        )

    return run


def genai(target: Path, draft: Path | None, ends: set[int], tokens: int) -> Run:
    from fastdraft_hf.decode.openvino.pipeline import OpenVINODecoder

    pipeline = OpenVINODecoder(target, draft, properties=EXACT)

    def run(prompt: EvaluationPrompt, gamma: int) -> DecodingRecord:
        return pipeline.decode(
            prompt.ids,
            task=prompt.task,
            key=prompt.key,
            max_new_tokens=tokens,
            stop_ids=ends,
            num_assistant_tokens=gamma,
        )

    return run


def open_path(name: str, folder: Path, draft: Path, target: Any, tokens: int) -> Run:
    """Return a function that decodes by a path or its baseline."""
    if name in ("alone", "transformers", "ours"):
        model = None if name == "alone" else AutoModelForCausalLM.from_pretrained(draft).eval()
        return pytorch(target, model, "transformers" if name == "alone" else name, tokens)
    exported, small = cached_openvino(folder, "fp32"), cached_openvino(draft, "fp32")
    if name.startswith("openvino"):
        ends = stop_ids(folder, AutoTokenizer.from_pretrained(folder))
        return genai(exported, None if name == "openvino-alone" else small, ends, tokens)
    from optimum.intel import OVModelForCausalLM

    def load(path: Path) -> Any:
        return OVModelForCausalLM.from_pretrained(path, ov_config=EXACT)

    model = None if name == "ours-openvino-alone" else load(small)
    return pytorch(load(exported), model, "ours", tokens)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--draft", type=Path, required=True, help="a draft of the target")
    parser.add_argument("--target", default="embedded:smollm2-135m-instruct")
    parser.add_argument("--prompts", type=int, default=100, help="of each of the two task sets")
    parser.add_argument("--tokens", type=int, default=24, help="length of an answer")
    parser.add_argument("--paths", default=",".join(PATHS), help="some of the paths")
    parser.add_argument("--work", type=Path, default=Path("runs/lossless"))
    args = parser.parse_args()
    quiet_libraries()
    paths = args.paths.split(",")
    if unknown := [path for path in paths if path not in PATHS]:
        parser.error(f"--paths: no path {unknown[0]}; known: {', '.join(PATHS)}")
    if not openvino_available():
        paths = [path for path in paths if "openvino" not in path]
    folder = resolve_target(args.target).path
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompts = draw_prompts(tokenizer, ["humaneval", "ifbench"], args.prompts, 300, 0)
    target = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    args.work.mkdir(parents=True, exist_ok=True)
    journal = Journal(args.work / "records.jsonl")

    def label(path: str, number: int) -> str:
        return f"{path}/{args.tokens}/{prompts[number].task}/{prompts[number].key}"

    for path in dict.fromkeys(name for one in paths for name in (PATHS[one], one)):
        due = [n for n in range(len(prompts)) if label(path, n) not in journal]
        if not due:
            continue
        run = open_path(path, folder, args.draft, target, args.tokens)
        with Progress(path, len(prompts), "answers", done=len(prompts) - len(due)) as progress:
            for number in due:
                gamma = number % 8 + 1 if path in PATHS else 0
                journal.add(label(path, number), run(prompts[number], gamma))
                progress.advance(1)
        del run

    print(f"float32, greedy, {args.tokens} tokens, {len(prompts)} prompts, γ from 1 to 8\n")
    print("| path | identical | ties rounded apart (largest margin) | faults | acceptance rate |")
    print("|---|---|---|---|---|")
    faults = 0
    for path in paths:
        found, records = [], []
        for number, prompt in enumerate(prompts):
            alone = journal[label(PATHS[path], number)].tokens
            records.append(journal[label(path, number)])
            theirs = records[-1].tokens
            if alone == theirs:
                continue
            position = first_difference(alone, theirs)
            if position == min(len(alone), len(theirs)):  # cut short
                found.append(Margin(float("inf"), 0.0))
            else:
                found.append(greedy_margin(target, [*prompt.ids, *alone[:position]]))
        ties = [one.margin for one in found if one.tie]
        wrong = len(found) - len(ties)
        faults += wrong
        print(
            f"| {path} | {len(prompts) - len(found)} | {len(ties)} ({max(ties, default=0):.1e}) "
            f"| {wrong} | {acceptance_rate(records):.3f} |"
        )
    return int(faults > 0)


if __name__ == "__main__":
    sys.exit(main())
