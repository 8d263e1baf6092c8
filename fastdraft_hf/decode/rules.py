"""The acceptance rules: how many drafted tokens stay, and which token follows them.

Shapes: B rows, g drafted tokens, V vocabulary. A row may have drafted fewer than g: ``limits`` [B]
is how many of its drafts count. Both rules return the number of accepted drafts [B] and the
target's own next token [B].
"""

import numpy
import torch


def first_choice(scores: torch.Tensor) -> torch.Tensor:
    """Return ``scores.argmax(-1)``.

    Over a vocabulary of 49,152 float32 scores PyTorch takes ten times as long as NumPy on a CPU,
    and a round asks γ + 2 times.
    """
    if scores.device.type == "cpu" and scores.dtype == torch.float32:
        return torch.from_numpy(numpy.asarray(scores.numpy().argmax(-1)))
    return scores.argmax(-1)


def certainty(scores: torch.Tensor, best: torch.Tensor) -> torch.Tensor:
    """Return the probability of the first choice, 0 if all is ruled out, of scores [..., V]."""
    return (scores - best).float().exp_().sum(-1).reciprocal().nan_to_num(0.0)


def accept_greedy(
    drafts: torch.Tensor, scores: torch.Tensor, limits: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Accept drafts as long as they are the target's first choice.

    Args:
        drafts: [B, g] drafted ids.
        scores: [B, g + 1, V] the target's scores at each drafted position and one after.
        limits: [B] drafts that count.
    """
    best = first_choice(scores)
    count = drafts.shape[1]
    counted = torch.arange(count, device=drafts.device) < limits[:, None]
    accepted = ((drafts == best[:, :count]) & counted).long().cumprod(1).sum(1)
    return accepted, best.gather(1, accepted[:, None])[:, 0]


def accept_sampled(
    drafts: torch.Tensor, q: torch.Tensor, p: torch.Tensor, limits: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Block verification (Sun et al. 2024, arXiv 2403.10444, algorithm 2).

    Let w_0 = 1 and w_i = min(1, w_{i-1} p(x_i)/q(x_i)), with p and q after the drafts before x_i.
    The first i drafts stay with probability h_i = s_i / (s_i + 1 - w_i), where
    s_i = Σ_v max(0, w_i p(v) - q(v)) with p and q after x_i, and the whole block with its w. The
    longest such prefix is accepted. The next token then comes from max(0, w_i p - q), normalized,
    and after the whole block from p. The tokens are distributed as the target's own, whatever q is,
    and at least as many are accepted as token by token (Leviathan et al. 2023, arXiv 2211.17192).

    Args:
        drafts: [B, g] ids drawn from ``q``.
        q: [B, g, V] the draft's probabilities.
        p: [B, g + 1, V] the target's.
        limits: [B] drafts that count. It may depend on the drafts.
    """
    rows, count = drafts.shape
    if not count:
        return torch.zeros_like(limits), torch.multinomial(p[:, 0], 1)[:, 0]
    chosen = drafts[..., None]
    ratios = (p[:, :count].gather(2, chosen) / q.gather(2, chosen))[..., 0]
    weights = [torch.ones_like(ratios[:, 0])]
    for ratio in ratios.unbind(1):
        weights.append((weights[-1] * ratio).clamp(max=1))
    w = torch.stack(weights, 1)
    inner = w[:, 1:count]
    rest = (inner[..., None] * p[:, 1:count] - q[:, 1:]).clamp(min=0).sum(-1)
    # Where p = q and w = 1, the drafts after this one are accepted in any case.
    h = torch.where(rest > 0, rest / (rest + 1 - inner), (inner == 1).float())
    numbers = torch.arange(1, count + 1, device=drafts.device)
    limits = limits[:, None]
    h = torch.where(numbers == limits, w[:, 1:], torch.nn.functional.pad(h, (0, 1)))
    # Strictly below, so that a token of probability 0 is never kept, whatever is drawn.
    accepted = (numbers * ((torch.rand_like(h) < h) & (numbers <= limits))).amax(1)
    row = torch.arange(rows, device=drafts.device)
    # After the whole block there is no draft to compare with: q = 0.
    q_next = q[row, accepted.clamp(max=count - 1)] * (accepted[:, None] < limits)
    chance = residual(w[row, accepted, None] * p[row, accepted], q_next)
    return accepted, torch.multinomial(chance, 1)[:, 0]


def next_token(
    scores: torch.Tensor, draft: torch.Tensor | None, q: torch.Tensor | None, sampling: bool
) -> tuple[int, bool]:
    """Return one row's next token, and whether it is the draft's, accepted.

    Speculative sampling (Leviathan et al. 2023, arXiv 2211.17192, algorithm 1): block verification
    needs the scores after a draft before it is accepted, and here they come after.

    Args:
        scores: [1, V] the target's.
        draft: [1, 1] the drafted id; ``None`` after the last one.
        q: [1, V] the draft's probabilities, when sampling.
    """
    if not sampling:
        best = int(first_choice(scores)[0])
        return best, draft is not None and best == int(draft)
    p = scores.softmax(-1)
    if draft is not None and q is not None:
        token = int(draft)
        if torch.rand((), device=p.device) * q[0, token] < p[0, token]:
            return token, True
        p = residual(p, q)
    return int(torch.multinomial(p, 1)), False


def residual(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """Return the weights that the next token is drawn with after a rejection: max(0, p - q).

    Args:
        p: [B, V] the target's probabilities, weighted.
        q: [B, V] the draft's.
    """
    rest = (p - q).clamp(min=0)
    # Where p and q agree to the last bit, a rejection is a rounding and p itself is right.
    return torch.where(rest.sum(-1, keepdim=True) > 0, rest, p)
