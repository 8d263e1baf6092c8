"""The objective of one chunk of tokens: its values, and its gradient by the logits.

For a term f over B outcomes with s = ∂f/∂(log q), and z the logits, the gradient is

    ∂f/∂z_v = (q_v / q_b) s_b − q_v Σ s,    b the outcome that token v belongs to.

With stored top-k that is one factor for the whole row of the softmax, and k entries written over
it: token-level objectives cost little more than cross-entropy.

Shapes: n tokens of a chunk, V vocabulary, B outcomes, k stored tokens.
"""

from __future__ import annotations

import torch

from fastdraft_hf.train.distribution import TargetHead, TopK
from fastdraft_hf.train.objectives import Objective, Pair

# Columns of a table taken at a time where an operation has to make another one of them.
_COLUMNS = 16_384


class Sums:
    """What is added up over chunks: the weighted loss, each term, the counts."""

    def __init__(self, objective: Objective, device: torch.device) -> None:
        # Not every accelerator has float64.
        self.dtype = torch.float64 if device.type in ("cpu", "cuda") else torch.float32

        def zero() -> torch.Tensor:
            return torch.zeros((), dtype=self.dtype, device=device)

        self.terms = {name: zero() for name in objective.weights}
        self.correct, self.acceptance, self.agreement = zero(), zero(), zero()

    def vector(self) -> torch.Tensor:
        return torch.stack([*self.terms.values(), self.correct, self.acceptance, self.agreement])


class Tables:
    """Tables [chunk, V] that one chunk after the other is computed in.

    On a CPU a fresh table of this size costs several times the softmax that goes into it: the
    allocator gives memory as large back to the system, which hands it out page by page.
    """

    def __init__(self, chunk: int, vocabulary: int, like: torch.Tensor, dtype: torch.dtype) -> None:
        self._shape, self._dtype, self._device = (chunk, vocabulary), dtype, like.device
        self._tables: dict[str, torch.Tensor] = {}

    def take(self, name: str, rows: int) -> torch.Tensor:
        """Return the first rows of a table; what is in it is anybody's."""
        if name not in self._tables:
            self._tables[name] = torch.empty(self._shape, dtype=self._dtype, device=self._device)
        return self._tables[name][:rows]


def logits_gradient(
    logits: torch.Tensor,
    tables: Tables,
    labels: torch.Tensor,
    objective: Objective,
    target: TopK | TargetHead | None,
    temperature: float,
    sums: Sums,
) -> torch.Tensor:
    """Add a chunk's values to ``sums`` and return the gradient by its logits, [n, V]."""
    highest = logits.amax(-1, keepdim=True)
    sums.correct += (logits.gather(1, labels) >= highest).sum()
    label_weight = objective.label_weight
    if target is None:
        return _label_gradient(logits, tables, highest, labels, label_weight, sums)
    if isinstance(target, TargetHead):
        gradient = _full_gradient(logits, highest, target, objective, temperature, sums)
    elif temperature == 1.0:  # the label's term shares the softmax
        return _top_k_gradient(
            logits, tables, highest, target, objective, 1.0, label_weight, labels, sums
        )
    else:
        gradient = _top_k_gradient(
            logits, tables, highest, target, objective, temperature, 0.0, labels, sums
        )
    if label_weight:
        gradient += _label_gradient(logits, tables, highest, labels, label_weight, sums)
    return gradient


def _softmax(logits: torch.Tensor, out: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the softmax [n, V], in ``out``, and log q of the most probable token [n, 1].

    The softmax sums in float32 inside, whatever its type. Any token's log q is its logit minus the
    highest plus this one: differences of logits stay exact where log Σ exp would be rounded to the
    size of the logits.
    """
    torch.softmax(logits, -1, out=out)
    return out, out.amax(-1, keepdim=True).float().log()


def _sum(table: torch.Tensor) -> torch.Tensor:
    """Return the rows' sums [n, 1] in float32."""
    if table.dtype == torch.float32 or table.is_cuda:
        return table.sum(-1, keepdim=True, dtype=torch.float32)
    # Of another type, a CPU makes the table in float32 first.
    total = torch.zeros(table.shape[0], 1, device=table.device)
    for part in torch.split(table, _COLUMNS, dim=-1):
        total += part.sum(-1, keepdim=True, dtype=torch.float32)
    return total


def _put(table: torch.Tensor, ids: torch.Tensor, values: torch.Tensor | float) -> None:
    """Write ``values`` [n, k] over the columns ``ids`` [n, k], every id of a row once.

    As `scatter_`, which on a CPU makes another table if the type is bfloat16.
    """
    rows = torch.arange(table.shape[0], device=table.device)[:, None].expand_as(ids)
    wanted = torch.as_tensor(values, dtype=table.dtype, device=table.device)
    table.index_put_((rows, ids), wanted)


def _log_q(
    logits: torch.Tensor, ids: torch.Tensor, highest: torch.Tensor, log_highest: torch.Tensor
) -> torch.Tensor:
    """Return log q of ``ids`` [n, k] in float32."""
    return logits.gather(1, ids).float() - highest.float() + log_highest


def _label_gradient(
    logits: torch.Tensor,
    tables: Tables,
    highest: torch.Tensor,
    labels: torch.Tensor,
    weight: float,
    sums: Sums,
) -> torch.Tensor:
    """Cross-entropy: q − 1 at the label."""
    gradient, log_highest = _softmax(logits, tables.take("label", len(logits)))
    sums.terms["ce"] -= _log_q(logits, labels, highest, log_highest).sum(dtype=sums.dtype)
    _put(gradient, labels, gradient.gather(1, labels) - 1.0)
    if weight != 1.0:
        gradient *= weight
    return gradient


def _terms_over(pair: Pair, objective: Objective, sums: Sums) -> torch.Tensor | None:
    """Add every divergence's values to ``sums``; return the weighted slopes [n, B]."""
    slope: torch.Tensor | None = None
    for name, (weight, term) in objective.divergences.items():
        values, by_log_q = term.value_and_slope(pair)
        sums.terms[name] += values.sum(dtype=sums.dtype)
        weighted = weight * by_log_q
        slope = weighted if slope is None else slope + weighted
    sums.acceptance += pair.acceptance.sum(dtype=sums.dtype)
    return slope


def _top_k_gradient(
    logits: torch.Tensor,
    tables: Tables,
    highest: torch.Tensor,
    target: TopK,
    objective: Objective,
    temperature: float,
    label_weight: float,
    labels: torch.Tensor,
    sums: Sums,
) -> torch.Tensor:
    """The terms over k tokens and the bucket of the rest, and cross-entropy if its weight is given.

    ``label_weight`` is that of a cross-entropy at the same temperature.
    """
    if temperature != 1.0:
        logits = torch.div(logits, temperature, out=tables.take("tempered", len(logits)))
        highest = highest / temperature
    probabilities, log_highest = _softmax(logits, tables.take("top-k", len(logits)))
    sums.agreement += (logits.gather(1, target.first()) >= highest).sum()
    kept = _log_q(logits, target.ids, highest, log_highest)
    # The rest is summed over itself: 1 − Σ of the others would lose a small one to rounding.
    _put(probabilities, target.ids, 0.0)
    rest = _sum(probabilities).clamp(min=torch.finfo(torch.float32).tiny)
    pair = Pair(target.buckets(), torch.cat([kept, rest.log()], 1))
    slope = _terms_over(pair, objective, sums)
    kept_q = kept.exp()
    row = torch.full_like(rest, label_weight)
    at_kept = label_weight * kept_q
    if slope is not None:
        total = slope.sum(-1, keepdim=True)
        row += (slope[:, -1:] / rest - total) / temperature
        # Where the draft rules the rest out, this is a huge number times probabilities of zero.
        most = torch.finfo(probabilities.dtype).max / 2
        row.clamp_(min=-most, max=most)
        at_kept += (slope[:, :-1] - kept_q * total) / temperature
    gradient = probabilities.mul_(row.to(probabilities.dtype))
    _put(gradient, target.ids, at_kept)
    if label_weight:
        sums.terms["ce"] -= _log_q(logits, labels, highest, log_highest).sum(dtype=sums.dtype)
        _put(gradient, labels, gradient.gather(1, labels) - label_weight)
    return gradient


def _full_gradient(
    logits: torch.Tensor,
    highest: torch.Tensor,
    target: TargetHead,
    objective: Objective,
    temperature: float,
    sums: Sums,
) -> torch.Tensor:
    """The terms over the whole vocabulary."""
    wanted = target.logits()
    sums.agreement += (logits.gather(1, wanted.argmax(-1, keepdim=True)) >= highest).sum()
    pair = Pair(
        torch.log_softmax(wanted / temperature, -1),
        torch.log_softmax(logits.float() / temperature, -1),
    )
    slope = _terms_over(pair, objective, sums)
    if slope is None:  # cross-entropy alone; the target is there for the acceptance in the log
        return torch.zeros_like(logits)
    total = slope.sum(-1, keepdim=True)
    gradient: torch.Tensor = slope.addcmul(pair.q, total, value=-1.0)
    return gradient.div_(temperature).to(logits.dtype)


def add_product(total: torch.Tensor, gradient: torch.Tensor, part: torch.Tensor) -> None:
    """Add ``gradient.T @ part`` to ``total`` [V, H] in float32."""
    if gradient.dtype == torch.float32:
        total.addmm_(gradient.T, part)
        return
    # A product in another type needs a table to stand in; of some rows at a time, for it to be
    # small whatever the vocabulary.
    for start in range(0, total.shape[0], _COLUMNS):
        rows = slice(start, start + _COLUMNS)
        total[rows] += gradient[:, rows].T @ part


__all__ = ["Sums", "Tables", "add_product", "logits_gradient"]
