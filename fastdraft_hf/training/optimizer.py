"""Muon for the matrices and AdamW for the rest, as one optimizer that a checkpoint can hold.

At the few hundred thousand tokens a small machine can afford, a draft trained with Muon (Jordan et
al. 2024; ``torch.optim.Muon``) accepts several times what AdamW reaches
(`benchmarks/quickstart_choices.py`). Muon is made for matrices between hidden states; embeddings,
head, norms and biases stay with AdamW, as its authors advise.
"""

from __future__ import annotations

from typing import Any

import torch


class MuonWithAdamW(torch.optim.Optimizer):
    """Steps a `torch.optim.Muon` and a `torch.optim.AdamW` together.

    ``param_groups`` are those of both, so that a learning-rate scheduler drives both and a
    checkpoint keeps both.

    Args:
        matrices: 2D parameters of the layers.
        groups: AdamW's parameter groups: everything else, with their own rates.
        lr: Muon's learning rate. Updates are scaled to AdamW's root mean square, so that rates of
            the two are comparable (``adjust_lr_fn="match_rms_adamw"``).
        weight_decay: of the matrices.
        betas, eps: AdamW's.
    """

    def __init__(
        self,
        matrices: list[torch.nn.Parameter],
        groups: list[dict[str, Any]],
        *,
        lr: float,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
    ) -> None:
        self._muon = torch.optim.Muon(
            matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"
        )
        self._adamw = torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)
        # The base class keeps hooks and the profiler's name; groups and state are the parts' own.
        super().__init__([*matrices, *(p for g in groups for p in g["params"])], {})
        self.param_groups = [*self._muon.param_groups, *self._adamw.param_groups]

    @property
    def parts(self) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
        """Muon and AdamW."""
        return self._muon, self._adamw

    def step(self, closure: Any = None) -> Any:
        loss = closure() if closure is not None else None
        for part in self.parts:
            part.step()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        return {"muon": self._muon.state_dict(), "adamw": self._adamw.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._muon.load_state_dict(state_dict["muon"])
        self._adamw.load_state_dict(state_dict["adamw"])
        self.param_groups = [*self._muon.param_groups, *self._adamw.param_groups]
