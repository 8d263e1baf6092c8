"""Linear layers over a handful of tokens on a CPU, in the order of factors that is fastest there.

Verifying γ + 1 tokens multiplies every weight [N, K] with a few columns. PyTorch's float32
``linear`` computes x·Wᵀ, for which the BLAS has no good kernel when x has 2 to 8 rows; W·xᵀ is the
same product and was up to twice as fast with one thread and up to six times with two, for one
token padded to two as well (docs/decoding.md). Which is faster depends on shape, threads and
machine, so each shape is timed once per process.
"""

import time
from collections.abc import Callable, Sequence

import torch
from torch.nn.functional import linear

# With more rows than this, the order of `linear` is the faster one.
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
    """Return the product for a single row, computed twice: two rows take the faster kernel."""
    return torch.mm(weight, rows.expand(2, -1).contiguous().t())[:, :1].t().contiguous()


# (N, K, rows, threads) -> the faster way, as timed in this process.
_best: dict[tuple[int, int, int, int], Way] = {}


def _choose(rows: torch.Tensor, weights: Sequence[torch.Tensor]) -> Way:
    """Return the faster way, timed over several weights: one alone would stay in the cache."""
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


class _SkinnyLinear(torch.nn.Linear):
    """A linear layer whose product runs in the faster order. Made by `with_skinny_linears` only."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        way: Way = linear
        count = inputs.numel() // inputs.shape[-1]
        if 0 < count <= MOST_ROWS:
            rows = inputs.reshape(count, -1)
            way = _choose(rows, self.__dict__["_alike"])
        if way is linear:
            return linear(inputs, self.weight, self.bias)
        output = way(rows, self.weight)
        if self.bias is not None:
            output = output + self.bias
        return output.view(*inputs.shape[:-1], self.weight.shape[0])


def with_skinny_linears(model: torch.nn.Module) -> torch.nn.Module:
    """Return a view of ``model`` whose large float32 CPU linear layers take the faster order.

    The view shares parameters, buffers and hooks; no module of ``model`` is changed, so several
    threads may decode with it at once. Layers of other classes (quantized, adapted) and layers
    whose ``forward`` was replaced are left as they are.
    """
    shapes: dict[tuple[int, ...], list[torch.Tensor]] = {}
    views: dict[int, torch.nn.Module] = {}

    def view(module: torch.nn.Module) -> torch.nn.Module:
        if id(module) in views:
            return views[id(module)]
        copied = views[id(module)] = type(module).__new__(type(module))
        copied.__dict__ = dict(module.__dict__)
        copied.__dict__["_modules"] = {
            name: None if child is None else view(child) for name, child in module._modules.items()
        }
        if type(module) is torch.nn.Linear and "forward" not in vars(module):
            weight = module.weight
            plain = weight.dtype == torch.float32 and weight.device.type == "cpu"
            if plain and weight.numel() >= LEAST_ELEMENTS:
                alike = shapes.setdefault(tuple(weight.shape), [])
                if len(alike) * weight.numel() < TIMED_ELEMENTS:
                    alike.append(weight)
                copied.__class__ = _SkinnyLinear
                copied.__dict__["_alike"] = alike
        return copied

    return view(model)
