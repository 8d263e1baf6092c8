"""The objective as plain formulas over full tables; no loss here is the package's."""

import math
from collections.abc import Callable, Iterable, Mapping

import torch

from fastdraft_hf.data.target_logits import FLOOR
from fastdraft_hf.train.distribution import TargetHead, TopK

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


def logits_of(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
) -> torch.Tensor:
    raw = hidden @ weight.T
    logits = scale * (raw if bias is None else raw + bias)
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def outcomes(
    logits: torch.Tensor, target: TopK | TargetHead, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return log p and log q over the outcomes of the target, in the type of the logits."""
    log_q = torch.log_softmax(logits / temperature, -1)
    if isinstance(target, TargetHead):
        head, kind = target.head, logits.dtype
        bias = None if head.bias is None else head.bias.to(kind)
        hidden, weight = target.hidden.to(kind), head.weight.to(kind)
        wanted = logits_of(hidden, weight, bias, head.scale, head.softcap)
        return torch.log_softmax(wanted / temperature, -1), log_q
    stored = torch.cat([target.log_probs, target.tail[:, None]], 1).to(logits.dtype)
    if target.ids.shape[1] == logits.shape[1]:  # no tail
        tail = log_q.new_full((log_q.shape[0], 1), FLOOR)
    else:
        tail = log_q.scatter(1, target.ids, float("-inf")).logsumexp(-1, keepdim=True)
    log_p = torch.log_softmax(stored.clamp(min=FLOOR), -1)
    return log_p, torch.cat([log_q.gather(1, target.ids), tail], 1)


def dense_terms(
    logits: torch.Tensor,
    labels: torch.Tensor,
    names: Iterable[str],
    target: TopK | TargetHead | None = None,
    temperature: float = 1.0,
) -> dict[str, torch.Tensor]:
    """Return the sum of every term over the tokens."""
    pair = None if target is None else outcomes(logits, target, temperature)
    sums = {}
    for name in names:
        if name == "ce":
            sums[name] = -torch.log_softmax(logits, -1).gather(1, labels[:, None]).sum()
        else:
            assert pair is not None
            sums[name] = FORMULAS[name](*pair).sum()
    return sums


def weighted(terms: Mapping[str, torch.Tensor], weights: Mapping[str, float]) -> torch.Tensor:
    return torch.stack([weight * terms[name] for name, weight in weights.items()]).sum()
