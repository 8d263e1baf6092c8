"""Muon for the layers' matrices, Adam by rows for the tables, AdamW for the rest, as one optimizer.

At the few hundred thousand tokens that a small machine can afford, a draft trained with Muon
(Jordan et al. 2024; `Muon`) has a higher acceptance rate than with AdamW
(benchmarks/README.md). Muon is made for matrices between hidden states; embeddings, head, norms
and biases stay with Adam, as its authors advise.
"""

from collections.abc import Iterable
from typing import Any

import torch


class Muon(torch.optim.Muon):
    """`torch.optim.Muon` with its Newton-Schulz iterations in float32.

    In bfloat16, as in PyTorch, the same batch gives another update when it is split over two
    processes. Updates are scaled to AdamW's root mean square (``adjust_lr_fn="match_rms_adamw"``).
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for weight in (p for p in group["params"] if p.grad is not None):
                state = self.state[weight]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(weight)
                momentum = state["momentum_buffer"].lerp_(weight.grad, 1 - group["momentum"])
                update = orthogonalized(weight.grad.lerp(momentum, group["momentum"]))
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.sub_(update, alpha=group["lr"] * 0.2 * max(weight.shape) ** 0.5)


def orthogonalized(matrix: torch.Tensor) -> torch.Tensor:
    """Move the singular values of a 2D matrix towards one (five quintic Newton-Schulz steps).

    Coefficients: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/. With X [m, n], m
    at most n, a step multiplies X by a polynomial of A = X Xᵀ, and A by its square. All of these
    commute, so only A and the product of the polynomials, [m, m], are iterated.
    """
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    wide = wide / wide.norm().clamp(min=1e-7)
    gram, product = wide @ wide.T, torch.eye(len(wide)).to(wide)
    for _ in range(5):
        polynomial = torch.addmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        polynomial.diagonal().add_(3.4445)
        gram, product = polynomial @ gram @ polynomial, polynomial @ product
    wide = torch.mm(product, wide)
    return wide if matrix.shape[0] <= matrix.shape[1] else wide.T


class RowAdam(torch.optim.SparseAdam):
    """`torch.optim.SparseAdam` that also takes dense gradients, of which it reads the rows.

    A step of sampled softmax reads a few thousand rows of a table. The others have a gradient of
    zero and stay as they are, in the weights and in the moments, whether the gradient is sparse or
    dense: one process and several, which reduce dense ones, do the same.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for weight in (p for group in self.param_groups for p in group["params"]):
            if weight.grad is not None:
                weight.grad = _rows_of(weight.grad)
        return super().step(closure)  # type: ignore[no-untyped-call]


def _rows_of(gradient: torch.Tensor) -> torch.Tensor:
    """Return a sparse gradient of the rows that are not zero."""
    rows, values = torch.arange(len(gradient), device=gradient.device), gradient
    if gradient.is_sparse:
        gradient = gradient.coalesce()
        rows, values = gradient.indices()[0], gradient.values()
    kept = values.any(1)
    return torch.sparse_coo_tensor(
        rows[kept][None], values[kept], gradient.shape, is_coalesced=True, check_invariants=False
    )


def clip_gradients(parameters: Iterable[torch.nn.Parameter], most: float) -> torch.Tensor:
    """Do what `torch.nn.utils.clip_grad_norm_` does, which takes no sparse gradients."""
    gradients = []
    for weight in parameters:
        if (gradient := weight.grad) is None:
            continue
        if gradient.is_sparse:
            weight.grad = coalesced = gradient.coalesce()
            gradient = coalesced.values()
        gradients.append(gradient)
    norm = torch.nn.utils.get_total_norm(gradients)
    torch._foreach_mul_(gradients, (most / (norm + 1e-6)).clamp(max=1.0))
    return norm


class MuonWithAdamW(torch.optim.Optimizer):
    """Steps a `Muon`, a `torch.optim.AdamW` and a `RowAdam` together.

    ``param_groups`` holds the groups of all, so that one learning-rate scheduler drives them.

    Args:
        matrices: 2D parameters of the layers.
        others: all other parameters.
        tables: embeddings and head, where a step reads few rows of them.
        muon_lr: Muon's learning rate, comparable to AdamW's.
        lr: AdamW's learning rate.
        weight_decay: of the matrices; the other parameters have none.
        betas, eps: AdamW's.
    """

    def __init__(
        self,
        matrices: list[torch.nn.Parameter],
        others: list[torch.nn.Parameter],
        tables: list[torch.nn.Parameter],
        *,
        muon_lr: float,
        lr: float,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
    ) -> None:
        muon = Muon(matrices, lr=muon_lr, weight_decay=weight_decay)
        # As groups, because a bare list must not be empty, and with adapters it is.
        adamw = torch.optim.AdamW(
            [{"params": others}], lr=lr, betas=betas, eps=eps, weight_decay=0.0, fused=True
        )
        rows = RowAdam([{"params": tables}], lr=lr, betas=betas, eps=eps)
        self.parts: dict[str, torch.optim.Optimizer] = {"muon": muon, "adamw": adamw, "rows": rows}
        super().__init__([*matrices, *others, *tables], {})  # for its hooks
        self._share_groups()

    def _share_groups(self) -> None:
        self.param_groups = [g for part in self.parts.values() for g in part.param_groups]

    def step(self, closure: Any = None) -> Any:
        loss = closure() if closure is not None else None
        for part in self.parts.values():
            part.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        return {name: part.state_dict() for name, part in self.parts.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for name, part in self.parts.items():
            part.load_state_dict(state_dict[name])
        self._share_groups()
