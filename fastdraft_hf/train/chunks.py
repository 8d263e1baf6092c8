"""The objective over one chunk of tokens: its values, and its gradient by the logits.

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

# Columns that are processed at a time where an operation needs a temporary table.
_COLUMNS = 16_384


class Chunks:
    """Computes one chunk after the other and sums the terms and counts.

    Its tables [chunk, V] are reused. On a CPU a new table of this size costs several times the
    softmax that goes into it, because the allocator returns such memory to the system.
    """

    def __init__(
        self,
        objective: Objective,
        temperature: float,
        shape: tuple[int, int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._objective, self._temperature = objective, temperature
        self._shape, self._dtype, self._device = shape, dtype, device
        self._tables: dict[str, torch.Tensor] = {}
        # Not every accelerator has float64.
        self.sum_dtype = torch.float64 if device.type in ("cpu", "cuda") else torch.float32
        self.terms = {name: self._zero() for name in objective.weights}
        self._correct, self._acceptance, self._agreement = (self._zero() for _ in range(3))

    def _zero(self) -> torch.Tensor:
        return torch.zeros((), dtype=self.sum_dtype, device=self._device)

    def sums(self) -> torch.Tensor:
        """Return the sums of every term, and of correct, accepted and agreeing tokens."""
        return torch.stack([*self.terms.values(), self._correct, self._acceptance, self._agreement])

    def loss(self) -> torch.Tensor:
        """Return the weighted sum of the terms."""
        loss = self._zero()
        for name, value in self.terms.items():
            loss = loss + self._objective.weights[name] * value
        return loss.float()

    def table(self, name: str, rows: int) -> torch.Tensor:
        """Return the first rows of a table, uninitialized."""
        if name not in self._tables:
            self._tables[name] = torch.empty(self._shape, dtype=self._dtype, device=self._device)
        return self._tables[name][:rows]

    def gradient(
        self, logits: torch.Tensor, labels: torch.Tensor, target: TopK | TargetHead | None
    ) -> torch.Tensor:
        """Add a chunk's values to the sums and return the gradient by its logits [n, V].

        Args:
            logits: [n, V].
            labels: [n, 1].
            target: the target's distribution for the n tokens.
        """
        highest = logits.amax(-1, keepdim=True)
        self._correct += (logits.gather(1, labels) >= highest).sum()
        label_weight = self._objective.label_weight
        if target is None:
            return self._by_labels(logits, highest, labels)
        if isinstance(target, TargetHead):
            gradient = self._by_vocabulary(logits, highest, target)
        elif self._temperature == 1.0:  # cross-entropy shares the softmax
            return self._by_top_k(logits, highest, target, labels, label_weight)
        else:
            gradient = self._by_top_k(logits, highest, target, labels, 0.0)
        if label_weight:
            gradient += self._by_labels(logits, highest, labels)
        return gradient

    def _by_labels(
        self, logits: torch.Tensor, highest: torch.Tensor, labels: torch.Tensor
    ) -> torch.Tensor:
        """Cross-entropy: q − 1 at the label."""
        gradient, log_highest = _softmax(logits, self.table("label", len(logits)))
        self._add_ce(_log_q(logits, labels, highest, log_highest))
        _put(gradient, labels, gradient.gather(1, labels) - 1.0)
        if self._objective.label_weight != 1.0:
            gradient *= self._objective.label_weight
        return gradient

    def _add_ce(self, log_q: torch.Tensor) -> None:
        self.terms["ce"] -= log_q.sum(dtype=self.sum_dtype)

    def _slopes(self, pair: Pair) -> torch.Tensor | None:
        """Add every divergence to its sum; return the weighted slopes [n, B]."""
        slope: torch.Tensor | None = None
        for name, (weight, term) in self._objective.divergences.items():
            values, by_log_q = term.value_and_slope(pair)
            self.terms[name] += values.sum(dtype=self.sum_dtype)
            weighted = weight * by_log_q
            slope = weighted if slope is None else slope + weighted
        self._acceptance += pair.acceptance.sum(dtype=self.sum_dtype)
        return slope

    def _by_top_k(
        self,
        logits: torch.Tensor,
        highest: torch.Tensor,
        target: TopK,
        labels: torch.Tensor,
        label_weight: float,
    ) -> torch.Tensor:
        """The terms over k tokens and the tail, and cross-entropy if it has a weight."""
        temperature = self._temperature
        if temperature != 1.0:
            logits = torch.div(logits, temperature, out=self.table("tempered", len(logits)))
            highest = highest / temperature
        probabilities, log_highest = _softmax(logits, self.table("top-k", len(logits)))
        self._agreement += (logits.gather(1, target.first()) >= highest).sum()
        kept = _log_q(logits, target.ids, highest, log_highest)
        # The tail is summed directly: 1 − Σ of the others would lose a small one to rounding.
        _put(probabilities, target.ids, 0.0)
        tail = _sum(probabilities).clamp(min=torch.finfo(torch.float32).tiny)
        slope = self._slopes(Pair(target.buckets(), torch.cat([kept, tail.log()], 1)))
        kept_q = kept.exp()
        row = torch.full_like(tail, label_weight)
        at_kept = label_weight * kept_q
        if slope is not None:
            total = slope.sum(-1, keepdim=True)
            row += (slope[:, -1:] / tail - total) / temperature
            # Where the draft rules the tail out, this is a huge number times zero.
            most = torch.finfo(probabilities.dtype).max / 2
            row.clamp_(min=-most, max=most)
            at_kept += (slope[:, :-1] - kept_q * total) / temperature
        gradient = probabilities.mul_(row.to(probabilities.dtype))
        _put(gradient, target.ids, at_kept)
        if label_weight:
            self._add_ce(_log_q(logits, labels, highest, log_highest))
            _put(gradient, labels, gradient.gather(1, labels) - label_weight)
        return gradient

    def _by_vocabulary(
        self, logits: torch.Tensor, highest: torch.Tensor, target: TargetHead
    ) -> torch.Tensor:
        """The terms over the whole vocabulary."""
        wanted, temperature = target.logits(), self._temperature
        self._agreement += (logits.gather(1, wanted.argmax(-1, keepdim=True)) >= highest).sum()
        pair = Pair(
            torch.log_softmax(wanted / temperature, -1),
            torch.log_softmax(logits.float() / temperature, -1),
        )
        slope = self._slopes(pair)
        if slope is None:  # cross-entropy alone; the target is there for the logged acceptance
            return torch.zeros_like(logits)
        total = slope.sum(-1, keepdim=True)
        gradient: torch.Tensor = slope.addcmul(pair.q, total, value=-1.0)
        return gradient.div_(temperature).to(logits.dtype)


def _softmax(logits: torch.Tensor, out: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the softmax [n, V], in ``out``, and log q of the most probable token [n, 1].

    Any token's log q is its logit minus the highest plus this one: differences of logits stay
    exact where log Σ exp would be rounded to the size of the logits.
    """
    torch.softmax(logits, -1, out=out)
    return out, out.amax(-1, keepdim=True).float().log()


def _log_q(
    logits: torch.Tensor, ids: torch.Tensor, highest: torch.Tensor, log_highest: torch.Tensor
) -> torch.Tensor:
    """Return log q of ``ids`` [n, k] in float32."""
    return logits.gather(1, ids).float() - highest.float() + log_highest


def _sum(table: torch.Tensor) -> torch.Tensor:
    """Return the rows' sums [n, 1] in float32; a CPU would cast the whole table to it first."""
    if table.dtype == torch.float32 or table.is_cuda:
        return table.sum(-1, keepdim=True, dtype=torch.float32)
    total = torch.zeros(table.shape[0], 1, device=table.device)
    for part in torch.split(table, _COLUMNS, dim=-1):
        total += part.sum(-1, keepdim=True, dtype=torch.float32)
    return total


def _put(table: torch.Tensor, ids: torch.Tensor, values: torch.Tensor | float) -> None:
    """`scatter_`, which on a CPU would copy a bfloat16 table; ids are unique in a row."""
    rows = torch.arange(table.shape[0], device=table.device)[:, None].expand_as(ids)
    wanted = torch.as_tensor(values, dtype=table.dtype, device=table.device)
    table.index_put_((rows, ids), wanted)


def add_product(total: torch.Tensor, gradient: torch.Tensor, part: torch.Tensor) -> None:
    """Add ``gradient.T @ part`` to ``total`` [V, H] in float32."""
    if gradient.dtype == torch.float32:
        total.addmm_(gradient.T, part)
        return
    # A product in another type needs a temporary table, which stays small for any vocabulary.
    for start in range(0, total.shape[0], _COLUMNS):
        rows = slice(start, start + _COLUMNS)
        total[rows] += gradient[:, rows].T @ part
