"""Compare the head of a small draft, forward and backward: one pass over chunks and full logits.

    python benchmarks/head.py [--tokens 512] [--vocab 49152] [--hidden 192] [--runs 7]
                              [--objectives ce,ce_kl] [--top-k 32]

Every objective (the name of a term or a preset) is compared with full logits under the same
objective. Those that need the target's distribution are measured twice: with its stored top k, and
with its entire distribution computed from hidden states as wide as the draft's. All run in turn in
one process; figures are medians with the range, and ratios are paired run by run.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from fastdraft_hf._head import Head
from fastdraft_hf.data.target_logits import top_k_of
from fastdraft_hf.train.config import has_fast_bf16
from fastdraft_hf.train.distribution import TargetHead, TopK
from fastdraft_hf.train.head import fused_head_loss
from fastdraft_hf.train.objectives import Objective, Pair

Loss = Callable[[], torch.Tensor]


def timed(loss: Loss, parameters: list[torch.Tensor]) -> float:
    for parameter in parameters:
        parameter.grad = None
    start = time.perf_counter()
    loss().backward()
    return time.perf_counter() - start


def ways(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    objective: Objective,
    target: TopK | TargetHead | None,
) -> dict[str, Loss]:
    """Return the losses to compare, the full logits first."""

    def dense() -> torch.Tensor:
        logits = hidden @ weight.T
        loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
        loss = objective.label_weight * loss
        if target is None:
            return loss
        log_q = torch.log_softmax(logits, -1)
        if isinstance(target, TargetHead):
            pair = Pair(torch.log_softmax(target.logits(), -1), log_q)
        else:
            tail = log_q.scatter(1, target.ids, float("-inf")).logsumexp(-1, keepdim=True)
            pair = Pair(target.buckets(), torch.cat([log_q.gather(1, target.ids), tail], 1))
        for weight_of, term in objective.divergences.values():
            loss = loss + weight_of * term.value_and_slope(pair)[0].sum()
        return loss

    def fused(dtype: torch.dtype) -> Loss:
        return lambda: (
            fused_head_loss(
                hidden, weight, labels, objective=objective, target=target, dtype=dtype
            ).loss
        )

    found: dict[str, Loss] = {
        "full logits, float32": dense,
        "one pass, float32": fused(torch.float32),
    }
    if has_fast_bf16("cpu"):
        found["one pass, bfloat16 products"] = fused(torch.bfloat16)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (
        ("tokens", 512),
        ("vocab", 49152),
        ("hidden", 192),
        ("runs", 7),
        ("top-k", 32),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--objectives", default="ce,ce_kl")
    args = parser.parse_args()
    torch.manual_seed(0)
    weight = (0.05 * torch.randn(args.vocab, args.hidden)).requires_grad_()
    hidden = torch.randn(args.tokens, args.hidden, requires_grad=True)
    labels = torch.randint(args.vocab, (args.tokens,))
    head = Head(0.2 * torch.randn(args.vocab, args.hidden), None)
    online = TargetHead(torch.randn(args.tokens, args.hidden), head)
    stored = TopK(*top_k_of(online.logits(), args.top_k))
    settings: dict[str, dict[str, Loss]] = {}
    for name in args.objectives.split(","):
        objective = Objective(name)
        if not objective.needs_distribution:
            settings[name] = ways(hidden, weight, labels, objective, None)
            continue
        settings[f"{name}, stored top {args.top_k}"] = ways(
            hidden, weight, labels, objective, stored
        )
        settings[f"{name}, whole distribution"] = ways(hidden, weight, labels, objective, online)
    times: dict[tuple[str, str], list[float]] = {}
    for run in range(args.runs + 1):
        for setting, losses in settings.items():
            for way, loss in losses.items():
                taken = timed(loss, [weight, hidden])
                if run:  # the first one warms up
                    times.setdefault((setting, way), []).append(taken)
    print(
        f"{args.tokens} tokens, vocabulary {args.vocab}, width {args.hidden}, "
        f"{torch.get_num_threads()} threads"
    )
    for setting, losses in settings.items():
        print(setting)
        reference = times[setting, next(iter(losses))]
        for way in losses:
            seconds = times[setting, way]
            ratios = [r / t for r, t in zip(reference, seconds, strict=True)]
            print(
                f"  {way:<28} {args.tokens / statistics.median(seconds):8,.0f} tokens/s "
                f"({args.tokens / max(seconds):,.0f} to {args.tokens / min(seconds):,.0f}), "
                f"{statistics.median(ratios):.2f}x ({min(ratios):.2f} to {max(ratios):.2f})"
            )


if __name__ == "__main__":
    main()
