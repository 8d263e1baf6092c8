"""Every term written out once more over log-probabilities; nothing here is the package's."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

Formula = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def kl(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def alpha(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    return torch.minimum(log_p.exp(), log_q.exp()).sum(-1)


def tvd(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    return 1 - alpha(log_p, log_q)


def jsd(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    return (kl(log_p, log_m) + kl(log_q, log_m)) / 2


def lk_hybrid(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    share = torch.exp(-3 * alpha(log_p, log_q)).detach()
    return share * kl(log_p, log_q) + (1 - share) * tvd(log_p, log_q)


FORMULAS: dict[str, Formula] = {
    "kl": kl,
    "rkl": lambda log_p, log_q: kl(log_q, log_p),
    "jsd": jsd,
    "tvd": tvd,
    "nla": lambda log_p, log_q: -alpha(log_p, log_q).log(),
    "lk_hybrid": lk_hybrid,
}
