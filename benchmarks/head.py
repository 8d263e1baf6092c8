"""The head of a small draft, forward and backward: one pass over chunks against full logits.

    python benchmarks/head.py [--tokens 512] [--vocab 49152] [--hidden 192] [--runs 7]

Both run in one process in turn; figures are medians with the range, ratios are paired run by run.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from fastdraft_hf.training.head import dense_cross_entropy, fused_cross_entropy
from fastdraft_hf.training.trainer import has_fast_bf16


def timed(loss: Callable[[], torch.Tensor], parameters: list[torch.Tensor]) -> float:
    for parameter in parameters:
        parameter.grad = None
    start = time.perf_counter()
    loss().backward()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("tokens", 512), ("vocab", 49152), ("hidden", 192), ("runs", 7)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    torch.manual_seed(0)
    weight = (0.05 * torch.randn(args.vocab, args.hidden)).requires_grad_()
    hidden = torch.randn(args.tokens, args.hidden, requires_grad=True)
    labels = torch.randint(args.vocab, (args.tokens,))
    ways: dict[str, Callable[[], torch.Tensor]] = {
        "full logits, float32": lambda: dense_cross_entropy(hidden, weight, labels),
        "one pass, float32": lambda: fused_cross_entropy(hidden, weight, labels).loss,
    }
    if has_fast_bf16("cpu"):
        ways["one pass, bfloat16 products"] = lambda: (
            fused_cross_entropy(hidden, weight, labels, dtype=torch.bfloat16).loss
        )
    times: dict[str, list[float]] = {name: [] for name in ways}
    for run in range(args.runs + 1):
        for name, loss in ways.items():
            taken = timed(loss, [weight, hidden])
            if run:
                times[name].append(taken)
    print(
        f"{args.tokens} tokens, vocabulary {args.vocab}, width {args.hidden}, "
        f"{torch.get_num_threads()} threads"
    )
    reference = times["full logits, float32"]
    for name, taken in times.items():
        ratios = [r / t for r, t in zip(reference, taken, strict=True)]
        print(
            f"{name:<28} {args.tokens / statistics.median(taken):8,.0f} tokens/s "
            f"({args.tokens / max(taken):,.0f} to {args.tokens / min(taken):,.0f}), "
            f"{statistics.median(ratios):.2f}x ({min(ratios):.2f} to {max(ratios):.2f})"
        )


if __name__ == "__main__":
    main()
