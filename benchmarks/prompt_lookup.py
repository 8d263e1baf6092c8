"""What prompt lookup adds to a draft in our loop, and where it costs.

    python benchmarks/prompt_lookup.py --draft DIR [--target ID] [--draft-openvino DIR]

For each γ the loop decodes with the draft alone (copies from 0 tokens: never) and with copies where
so many of the last tokens stood in the text before. All ways and the target alone through the same
kernels take turns within a prompt; ratios of tokens/s are paired, with 95% bootstrap intervals over
prompts. Beside the task sets, `language` is four questions in other languages and `random` random
tokens.
"""

from __future__ import annotations

import argparse
import functools
import random
from pathlib import Path
from typing import Any

from decoding import LANGUAGES, Way, in_turn, speed_ratio, spread

from fastdraft_hf.cli.run import quiet_libraries
from fastdraft_hf.data.prompts import chat_ids
from fastdraft_hf.decode.assisted import decode
from fastdraft_hf.draft.reduced_vocabulary import load_draft
from fastdraft_hf.eval.metrics import acceptance_rate, block_efficiency, tokens_per_second
from fastdraft_hf.eval.prompts import EvaluationPrompt, draw_prompts
from fastdraft_hf.export.openvino import cached_openvino
from fastdraft_hf.hub.card import describe_machine
from fastdraft_hf.stages.provenance import machine
from fastdraft_hf.target.resolve import load_tokenizer, resolve_target, stop_ids


def models(args: argparse.Namespace, target: Path) -> tuple[Any, Any]:
    if args.draft_openvino is None:
        return tuple(load_draft(one, dtype="float32").eval() for one in (target, args.draft))
    from optimum.intel import OVModelForCausalLM

    folders = (cached_openvino(target, "int8"), args.draft_openvino)
    return tuple(OVModelForCausalLM.from_pretrained(f, compile=False) for f in folders)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--target", default="embedded:smollm2-135m-instruct")
    parser.add_argument("--draft", type=Path, required=True)
    parser.add_argument("--draft-openvino", type=Path, help="OpenVINO instead of PyTorch")
    parser.add_argument(
        "--tasks", nargs="+", default=["humaneval", "ifbench", "language", "random"]
    )
    parser.add_argument("--prompts", type=int, default=8, help="of each task set")
    parser.add_argument("--new", type=int, default=64, help="new tokens at most")
    parser.add_argument("--gammas", type=int, nargs="+", default=[2, 3])
    parser.add_argument("--copies", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--temperature", type=float, default=0.0)
    args = parser.parse_args()
    quiet_libraries()
    folder = resolve_target(args.target).path
    tokenizer = load_tokenizer(folder, "--target")
    target, draft = models(args, folder)
    target.generation_config.eos_token_id = sorted(stop_ids(folder, tokenizer))

    def way(gamma: int, copies: int, prompt: EvaluationPrompt) -> Any:
        return decode(
            target,
            prompt.ids,
            task=prompt.task,
            key=prompt.key,
            max_new_tokens=args.new,
            temperature=args.temperature,
            draft=draft,
            num_assistant_tokens=gamma,
            prompt_lookup_min=copies,
            path="ours",
        )

    settings = [(gamma, copies) for gamma in args.gammas for copies in (0, *args.copies)]
    ways: dict[Any, Way] = {one: functools.partial(way, *one) for one in [(0, 0), *settings]}
    rng = random.Random(0)
    print(f"{describe_machine(machine())}\n")
    columns = ("task set", "γ", "copies from", "accepted", "tokens a pass", "tokens/s")
    print("| " + " | ".join((*columns, "over the draft alone", "over the target alone")) + " |")
    print("|---|---|---|---|---|---|---|---|")
    for task in args.tasks:
        if task == "language":
            ids = [chat_ids(tokenizer, text) for text in (LANGUAGES[0], *LANGUAGES)]
        elif task == "random":
            ids = [tuple(rng.randrange(20, len(tokenizer)) for _ in range(100)) for _ in range(5)]
        else:
            drawn = draw_prompts(tokenizer, [task], args.prompts + 1, 400, 0)
            ids = [prompt.ids for prompt in drawn]
        prompts = [EvaluationPrompt(task, str(number), one) for number, one in enumerate(ids)]
        found = in_turn(ways, prompts)
        alone = found[0, 0]
        print(f"| {task} | alone | | | | {tokens_per_second(alone):.1f} | | |")
        for gamma, copies in settings:
            records = found[gamma, copies]
            print(
                f"| {task} | {gamma} | {copies} | {acceptance_rate(records):.3f} "
                f"| {block_efficiency(records):.2f} | {tokens_per_second(records):.1f} "
                f"| {spread(speed_ratio(records, found[gamma, 0]))} "
                f"| {spread(speed_ratio(records, alone))} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
