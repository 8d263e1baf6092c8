"""The objective over a language-model head in one pass, never holding [tokens, vocabulary].

For a draft of 10M parameters and a vocabulary of 49k, the head is nine tenths of the work of
training. Chunk by chunk of tokens, the forward pass computes the logits, every term's value and
the gradients, and keeps only the gradients. The projection is done once (a checkpointed head
repeats it in the backward pass), and memory does not grow with tokens x vocabulary.

For a term f over B outcomes with s = ∂f/∂(log q), and z the logits, the gradient is

    ∂f/∂z_v = (q_v / q_b) s_b − q_v Σ s,    b the outcome that token v belongs to.

With stored top-k that is one factor for the whole row of the softmax, and k entries written over
it: token-level objectives cost little more than cross-entropy.

Shapes: N tokens that carry loss, n of a chunk, H hidden size, V vocabulary, B outcomes, k stored
tokens.
"""

from typing import Any, NamedTuple

import torch

from fastdraft_hf._errors import FastDraftError
from fastdraft_hf._head import head_logits
from fastdraft_hf.train.distribution import TargetHead, TopK
from fastdraft_hf.train.objectives import Objective, Pair

# Bytes of a chunk's logits in float32, so that memory is the same for every vocabulary: 256 tokens
# of 49k. With the target's full distribution a chunk has several such tables.
CHUNK_BYTES = 256 * 49_152 * 4
_CHUNK_BYTES_FULL = CHUNK_BYTES // 4
# oneDNN keeps a kernel and its workspace (some 20 MB with a large vocabulary) for each of the last
# 1,024 shapes of bfloat16 products on a CPU. Multiples of this keep the shapes few.
_ROWS_STEP = 64
# Columns that are processed at a time where an operation needs a temporary table.
_COLUMNS = 16_384


class HeadLoss(NamedTuple):
    """The head's output, summed over tokens.

    Attributes:
        loss: scalar, the weighted sum of the terms in nats; differentiable.
        terms: every term's own sum, by name, before weighting.
        correct: how many labels were the head's first choice (ties count as chosen).
        acceptance: Σ α, the expected acceptances; None without a distribution.
        agreement: how often the target's first choice was the head's; None without a distribution.
    """

    loss: torch.Tensor
    terms: dict[str, torch.Tensor]
    correct: torch.Tensor
    acceptance: torch.Tensor | None
    agreement: torch.Tensor | None


class _Chunks:
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
        """Add a chunk's values to the sums and return the gradient by its logits [n, V]."""
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


def _add_product(total: torch.Tensor, gradient: torch.Tensor, part: torch.Tensor) -> None:
    """Add ``gradient.T @ part`` to ``total`` [V, H] in float32."""
    if gradient.dtype == torch.float32:
        total.addmm_(gradient.T, part)
        return
    # A product in another type needs a temporary table, which stays small for any vocabulary.
    for start in range(0, total.shape[0], _COLUMNS):
        rows = slice(start, start + _COLUMNS)
        total[rows] += gradient[:, rows].T @ part


class _FusedHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        labels: torch.Tensor,
        settings: tuple[Any, ...],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        objective, target, temperature, scale, softcap, chunk, dtype = settings
        wants = ctx.needs_input_grad
        grad_hidden = torch.empty_like(hidden) if wants[0] else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if wants[1] else None
        grad_bias = (
            torch.zeros_like(bias, dtype=torch.float32) if bias is not None and wants[2] else None
        )
        projection = weight.to(dtype)
        offset = None if bias is None else bias.to(dtype)
        step = _ROWS_STEP if hidden.device.type == "cpu" and dtype != torch.float32 else 1
        size = min(chunk, -(-hidden.shape[0] // step) * step)
        chunks = _Chunks(objective, temperature, (size, weight.shape[0]), dtype, hidden.device)
        for start in range(0, hidden.shape[0], chunk):
            rows = slice(start, start + chunk)
            part = hidden[rows].to(dtype)
            count = part.shape[0]
            extra = min(chunk, -(-count // step) * step) - count
            if extra:
                part = torch.nn.functional.pad(part, (0, 0, 0, extra))
            table = chunks.table("logits", count + extra)
            logits = head_logits(part, projection, offset, scale, softcap, out=table)[:count]
            gradient = chunks.gradient(
                logits, labels[rows, None], None if target is None else target[rows]
            )
            if grad_hidden is None and grad_weight is None and grad_bias is None:
                continue
            # From here on `gradient` becomes that of the loss by the raw projection.
            if softcap is not None:
                gradient *= logits.div_(softcap).square_().neg_().add_(1)
            if scale != 1.0:
                gradient *= scale
            if grad_bias is not None:
                grad_bias += gradient.sum(0, dtype=torch.float32)
            if extra:
                padded = chunks.table("padded", count + extra)
                padded[:count], padded[count:] = gradient, 0.0
                gradient = padded
            if grad_hidden is not None:
                grad_hidden[rows] = (gradient @ projection)[:count]
            if grad_weight is not None:
                _add_product(grad_weight, gradient, part)
        # Not `save_for_backward`: released here, a gradient becomes the parameter's own instead of
        # being copied.
        ctx.gradients = [grad_hidden, grad_weight, grad_bias]
        ctx.dtypes = [hidden.dtype, weight.dtype, None if bias is None else bias.dtype]
        sums = chunks.sums()
        ctx.mark_non_differentiable(sums)
        return chunks.loss(), sums

    @staticmethod
    def backward(ctx: Any, grad_loss: torch.Tensor, _: torch.Tensor) -> tuple[Any, ...]:
        if ctx.gradients is None:
            raise RuntimeError(
                "the head's gradients were used; call the loss again for a second pass"
            )
        grads, ctx.gradients = ctx.gradients, None
        if grads[0] is not None:
            grads[0] = grads[0] * grad_loss.to(grads[0].dtype)
        for i in (1, 2):
            if grads[i] is not None:
                grads[i] = grads[i].mul_(grad_loss).to(ctx.dtypes[i])
        return *grads, None, None


def fused_head_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    objective: Objective | None = None,
    target: TopK | TargetHead | None = None,
    temperature: float = 1.0,
    scale: float = 1.0,
    softcap: float | None = None,
    chunk: int | None = None,
    dtype: torch.dtype | None = None,
) -> HeadLoss:
    """Return the summed objective under a language-model head.

    The logits are ``scale * (hidden @ weight.T + bias)``, soft-capped to
    ``softcap * tanh(logits / softcap)`` when a cap is given (Gemma 2).

    Args:
        hidden: [N, H], the last hidden states of the tokens that carry loss.
        weight: [V, H], the head's weights, tied or not.
        labels: [N], the ids to predict (already shifted), none of them ignored.
        bias: [V].
        objective: the weighted terms; cross-entropy by default.
        target: the target's distribution for every one of the N tokens.
        temperature: of both distributions in the divergences (stored ones were made at it);
            cross-entropy is taken at 1. Values and gradients are not rescaled by it.
        scale: factor of the logits (Granite divides by ``logits_scaling``, Cohere multiplies).
        softcap: cap of the logits.
        chunk: tokens at a time; by default as many as keep the memory the same for any vocabulary.
        dtype: of the matrix products; ``hidden``'s by default. Sums stay in float32. float16 is
            replaced by float32: half of a softmax over a vocabulary underflows in float16.

    Raises:
        FastDraftError: hidden states, labels and distribution are not of the same tokens, or a
            term needs a distribution and there is none.
    """
    objective = objective or Objective("ce")
    shapes = [tuple(hidden.shape[:-1]), tuple(labels.shape)]
    if target is not None:
        of_target = target.ids if isinstance(target, TopK) else target.hidden
        shapes.append(tuple(of_target.shape[:-1]))
    if any(shape != (len(hidden),) for shape in shapes):
        raise FastDraftError(f"hidden states, labels and distribution are of {shapes} tokens")
    if objective.needs_distribution and target is None:
        raise FastDraftError(f"objective {objective} needs the target's distribution")
    dtype = dtype or hidden.dtype
    if dtype == torch.float16:
        dtype = torch.float32
    if chunk is None:
        table = _CHUNK_BYTES_FULL if isinstance(target, TargetHead) else CHUNK_BYTES
        chunk = max(16, table // (4 * weight.shape[0]))
    settings = (objective, target, temperature, scale, softcap, chunk, dtype)
    # Under autocast the products would be in its type, whatever `dtype` says.
    with torch.autocast(hidden.device.type, enabled=False):
        loss, sums = _FusedHead.apply(hidden, weight, bias, labels, settings)  # type: ignore[no-untyped-call]
    *values, correct, acceptance, agreement = sums
    terms = dict(zip(objective.weights, values, strict=True))
    if target is None:
        return HeadLoss(loss, terms, correct, None, None)
    return HeadLoss(loss, terms, correct, acceptance, agreement)
