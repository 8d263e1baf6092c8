"""Would drafting a tree, or a block in one pass, pay? What the passes cost, and what it would gain.

    python benchmarks/trees.py [--draft DIR] [--draft-openvino DIR] [--prompts 10]

1. The target's pass over n tokens and the draft's, through our loop's models: PyTorch, and OpenVINO
   int8 with `--draft-openvino`. The widths are timed in turn, medians in milliseconds.
2. How often the target's greedy token is the draft's first, second, ... choice, on the target's
   own greedy answers.
3. The best chain against the best tree, in expected tokens per second. A tree of n nodes of some
   depth holds the n most probable paths, if every position is like the average one (Sequoia, arXiv
   2402.12374). Each level is one pass of the draft over the nodes that have children, then the
   target reads all nodes. Attention masks, bookkeeping and the reordering of the cache are not
   counted, so a tree is flattered.
4. Parallel drafting (PARD, arXiv 2504.18583): γ tokens from one pass of the draft over the last
   token and γ − 1 mask tokens. The most that a round gains is its shorter time, at the same
   acceptance; the break-even is the share of the chain's tokens per round that it must keep.
"""

from __future__ import annotations

import argparse
import heapq
import statistics
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastdraft_hf import embedded_target, load_draft
from fastdraft_hf._progress import Progress
from fastdraft_hf.decode.assisted import decode
from fastdraft_hf.decode.speculative import open_cached
from fastdraft_hf.eval.expected import Continuation, aligned_logits
from fastdraft_hf.eval.prompts import draw_prompts
from fastdraft_hf.export.openvino import cached_openvino
from fastdraft_hf.hub.card import describe_machine
from fastdraft_hf.stages.provenance import machine

WIDTHS = (1, 2, 3, 4, 5, 6, 8, 12, 16, 32)
RANKS = 8


def pass_seconds(model: Any, context: int, rounds: int) -> dict[int, float]:
    """Return the median seconds of a pass over each of `WIDTHS` after ``context`` tokens."""
    times: dict[int, list[float]] = {width: [] for width in WIDTHS}
    with torch.inference_mode():
        cached = open_cached(model)

        def feed(width: int, start: int) -> None:
            positions = torch.arange(start, start + width)[None]
            cached.feed(torch.randint(1000, 9000, (1, width)), positions, None, width)

        feed(context, 0)
        for number in range(rounds + 1):
            for width in WIDTHS:
                for repeat in range(3):  # OpenVINO prepares a pass again when its width changes
                    start = time.perf_counter()
                    feed(width, context)
                    if number and repeat:
                        times[width].append(time.perf_counter() - start)
                    cached.rollback(width, [0])
    return {width: statistics.median(found) for width, found in times.items()}


def at(times: dict[int, float], width: int) -> float:
    """Return the seconds of a pass, between two measured widths on the line through them."""
    above = min((w for w in times if w >= width), default=max(times))
    below = max(w for w in times if w <= width)
    if above == below:
        return times[above]
    share = (width - below) / (above - below)
    return times[below] + share * (times[above] - times[below])


def best_chain(hits: list[float], target: dict[int, float], draft: dict[int, float]) -> Any:
    """Return (tokens per second, γ) of the best chain."""
    found = []
    for gamma in range(1, 13):
        tokens = sum(hits[0] ** i for i in range(gamma + 1))
        found.append((tokens / (gamma * draft[1] + at(target, gamma + 1)), gamma))
    return max(found)


def best_tree(hits: list[float], target: dict[int, float], draft: dict[int, float]) -> Any:
    """Return (tokens per second, nodes, depth) of the best tree."""
    found = []
    for most in range(1, 13):
        tokens, nodes, expanded = 1.0, 0, [set[int]() for _ in range(most)]
        # Probability of the path, depth, rank at its last step, the node before it.
        waiting = [(-hits[0], 1, 0, 0)]
        while waiting and nodes < max(target) - 1:
            lost, depth, rank, parent = heapq.heappop(waiting)
            tokens, nodes = tokens - lost, nodes + 1
            expanded[depth - 1].add(parent)
            if depth < most:
                heapq.heappush(waiting, (lost * hits[0], depth + 1, 0, nodes))
            if rank + 1 < len(hits) and hits[rank]:
                sibling = lost / hits[rank] * hits[rank + 1]
                heapq.heappush(waiting, (sibling, depth, rank + 1, parent))
            # A pass of the draft for each level, over the nodes that have children there.
            drafting = sum(at(draft, len(nodes_of)) for nodes_of in expanded if nodes_of)
            found.append((tokens / (drafting + at(target, nodes + 1)), nodes, depth_of(expanded)))
    return max(found)


def parallel_gain(target: dict[int, float], draft: dict[int, float], gamma: int) -> float:
    """Return by how much a round is shorter when the draft runs once."""
    reads = at(target, gamma + 1)
    return (gamma * draft[1] + reads) / (at(draft, gamma) + reads)


def depth_of(expanded: list[set[int]]) -> int:
    return sum(map(bool, expanded))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", default=str(embedded_target()))
    parser.add_argument("--draft", default="model_cards/SmolLM2-135M-Instruct-FastDraft")
    parser.add_argument("--draft-openvino", help="its int8 export")
    parser.add_argument("--tasks", nargs="+", default=["humaneval", "ifbench"])
    parser.add_argument("--prompts", type=int, default=10)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=20)
    args = parser.parse_args()

    target = AutoModelForCausalLM.from_pretrained(args.target, dtype=torch.float32).eval()
    draft = load_draft(args.draft, dtype=torch.float32).eval()
    pairs: dict[str, tuple[Any, Any]] = {"PyTorch": (target, draft)}
    if args.draft_openvino:
        from optimum.intel import OVModelForCausalLM

        folders = (cached_openvino(Path(args.target), "int8"), args.draft_openvino)
        models = [OVModelForCausalLM.from_pretrained(one, compile=False) for one in folders]
        pairs["OpenVINO int8"] = (models[0], models[1])

    print(describe_machine(machine()))
    print(f"\n| pass after {args.context} tokens, ms | {' | '.join(map(str, WIDTHS))} |")
    print("|---|" + "---|" * len(WIDTHS))
    costs = {}
    for path, pair in pairs.items():
        costs[path] = [pass_seconds(model, args.context, args.rounds) for model in pair]
        for name, times in zip(("target", "draft"), costs[path], strict=True):
            cells = " | ".join(f"{1e3 * seconds:.2f}" for seconds in times.values())
            print(f"| {path}, {name} | {cells} |", flush=True)

    print("\n| parallel drafting | γ | most it gains | break-even |\n|---|---|---|---|")
    for path, (of_target, of_draft) in costs.items():
        for gamma in (2, 3, 4, 6, 8):
            gain = parallel_gain(of_target, of_draft, gamma)
            print(f"| {path} | {gamma} | {gain:.2f}x | {1 / gain:.0%} of the tokens |", flush=True)

    prompts = draw_prompts(
        AutoTokenizer.from_pretrained(args.target), args.tasks, args.prompts, 400, 1
    )
    ranks: dict[str, Counter[int]] = {task: Counter() for task in args.tasks}
    with Progress("read", len(prompts), "answers") as progress:
        for prompt in prompts:
            record = decode(target, prompt.ids, max_new_tokens=args.max_new_tokens)
            text = Continuation(prompt.task, prompt.ids, tuple(record.tokens))
            for wanted, drafted in aligned_logits(target, draft, text):
                own = drafted.gather(1, wanted.argmax(-1, keepdim=True))
                ranks[prompt.task].update((drafted > own).sum(-1).tolist())
            progress.advance(1)
    print("\n| task set | first, second, ... choice | path | best chain | best tree | ratio |")
    print("|---|---|---|---|---|---|")
    for task, counted in ranks.items():
        hits = [counted[rank] / counted.total() for rank in range(RANKS)]
        shares = ", ".join(f"{share:.3f}" for share in hits)
        for path, (of_target, of_draft) in costs.items():
            chain, gamma = best_chain(hits, of_target, of_draft)
            tree, nodes, depth = best_tree(hits, of_target, of_draft)
            print(
                f"| {task} | {shares} | {path} | γ = {gamma}: {chain:.1f} tokens/s | {nodes} "
                f"nodes, depth {depth}: {tree:.1f} tokens/s | {tree / chain:.2f}x |"
            )


if __name__ == "__main__":
    main()
