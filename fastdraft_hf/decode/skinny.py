"""Linear layers over a handful of tokens on a CPU, in the order of factors that is fastest there.

Verifying γ + 1 tokens multiplies every weight [N, K] with a few columns. PyTorch's float32
``linear`` computes x·Wᵀ, for which the BLAS has no good kernel when x has 2 to 8 rows; W·xᵀ is the
same product and was up to twice as fast with one thread and up to six times with two, for one
token padded to two as well (docs/decoding.md). Which is faster depends on shape, threads and
machine, so each shape is timed once per process.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.functional import linear

# More rows than this and linear's own order is the faster one.
MOST_ROWS = 8
# Weights of fewer elements cost next to nothing and are left alone.
LEAST_ELEMENTS = 2**17
# Weights of one shape are timed together up to this many elements.
TIMED_ELEMENTS = 2**24

Way = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def _product(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return rows [M, K] times weight [N, K] transposed, as [M, N]."""
    return torch.mm(weight, rows.t()).t().contiguous()


def _doubled(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The same for a single row, computed twice: two rows take the faster kernel."""
    return torch.mm(weight, rows.expand(2, -1).contiguous().t())[:, :1].t().contiguous()


# (N, K, rows, threads) -> the faster way, as timed in this process.
_best: dict[tuple[int, int, int, int], Way] = {}


def _choose(rows: torch.Tensor, weights: Sequence[torch.Tensor]) -> Way:
    """Time both ways over several weights of a shape; one alone would stay in the CPU's cache."""
    key = (*weights[0].shape, rows.shape[0], torch.get_num_threads())
    way = _best.get(key)
    if way is None:
        other: Way = _doubled if rows.shape[0] == 1 else _product
        times: dict[Way, list[float]] = {linear: [], other: []}
        for _ in range(3):
            for candidate, taken in times.items():
                start = time.perf_counter()
                for weight in weights:
                    candidate(rows, weight)
                taken.append(time.perf_counter() - start)
        way = _best[key] = other if min(times[other]) < 0.9 * min(times[linear]) else linear
    return way


def skinny_linear(
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    alike: Sequence[torch.Tensor],
    inputs: torch.Tensor,
) -> torch.Tensor:
    """Return what ``torch.nn.functional.linear(inputs, weight, bias)`` returns, to rounding.

    Args:
        weight, bias: [N, K] and [N], float32 on a CPU.
        alike: weights of the same shape to time with, ``weight`` or some of its neighbours.
        inputs: [..., K].
    """
    width = inputs.shape[-1]
    count = inputs.numel() // width
    if not 0 < count <= MOST_ROWS:
        return linear(inputs, weight, bias)
    rows = inputs.reshape(count, width)
    way = _choose(rows, alike)
    if way is linear:
        return linear(inputs, weight, bias)
    output = way(rows, weight)
    if bias is not None:
        output = output + bias
    return output.view(*inputs.shape[:-1], weight.shape[0])


@contextmanager
def skinny_linears(model: Any) -> Iterator[None]:
    """Let the model's large float32 CPU ``Linear`` layers run through `skinny_linear` meanwhile.

    Layers of other classes (quantised, adapted) and layers whose ``forward`` is already someone
    else's are left alone.
    """
    chosen: list[torch.nn.Linear] = []
    shapes: dict[tuple[int, ...], list[torch.Tensor]] = {}
    for module in model.modules():
        if type(module) is not torch.nn.Linear or "forward" in vars(module):
            continue
        weight = module.weight
        plain = weight.dtype == torch.float32 and weight.device.type == "cpu"
        if plain and weight.numel() >= LEAST_ELEMENTS:
            chosen.append(module)
            alike = shapes.setdefault(tuple(weight.shape), [])
            if len(alike) * weight.numel() < TIMED_ELEMENTS:
                alike.append(weight)
    for module in chosen:
        alike = shapes[tuple(module.weight.shape)]
        way = functools.partial(skinny_linear, module.weight, module.bias, alike)
        module.__dict__["forward"] = way
    try:
        yield
    finally:
        for module in chosen:
            del module.__dict__["forward"]
