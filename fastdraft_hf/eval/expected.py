"""Expected acceptance, teacher-forced: fast, without decoding.

Given texts the target itself wrote at temperature T, the chance that a drafted token is accepted
at a position is α = Σ_v min(p_v, q_v), p and q being the target's and the draft's distributions
there at that temperature (Leviathan et al. 2023, arXiv 2211.17192, theorem 3.5).

`expected_rounds` follows the rounds that decoding makes. Speculative sampling emits token v at a
drafted position by acceptance with probability min(p_v, q_v) and in all with p_v. So, *given* the
emitted text x, the drafted token of position t was the accepted one with probability

    a_t = min(1, q(x_t) / p(x_t)),

independently of other positions: a text of the target can be read as a decoded one whose
coins are still to be thrown. The chance that a round starts at t follows from the a of earlier
positions (a rejection or a whole accepted block ends a round), and a place of a block is reached
with the product of the a before it. That product is the importance weight min(p_v, q_v) / (α p_v)
that turns the target's texts into accepted ones, times the α of being accepted at all. Accepted
tokens, rounds and emitted tokens so have exactly the expectation that decoding has: there is no
bias to correct, for any γ. `expected_acceptance_rate` is the older, simpler figure: rounds from
every position alike and α all along, which is neither.

One thing is not exact: a draft that draws an end token stops its block early. That is counted as
long as what it drafted before is accepted; a draft that ends its text after a token that will be
rejected reads words nobody emitted, which no text shows. Drafted tokens are then overstated, by
at most γ - 2 for such a round, and the acceptance rate is understated by as much. Logits
processors besides temperature (a repetition penalty in the target's generation config) are not in
the estimate at all.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Continuation:
    """A text the target wrote: the prompt it read, and its own tokens."""

    task: str
    prompt_ids: tuple[int, ...]
    ids: tuple[int, ...]


def log_probabilities(
    model: PreTrainedModel, text: Continuation, temperature: float
) -> torch.Tensor:
    """Return the model's log distribution [len(text.ids), V] for every token of the text."""
    import torch

    with torch.inference_mode():
        inputs = torch.tensor([[*text.prompt_ids, *text.ids]], device=model.device)
        keep = len(text.ids) + 1
        logits = model(input_ids=inputs, logits_to_keep=keep).logits[0, :-1].float()
        return torch.log_softmax(logits / temperature, -1)


def expected_acceptance(target: torch.Tensor, draft: torch.Tensor) -> torch.Tensor:
    """Return α [T] from two log distributions [T, V]."""
    import torch

    return torch.minimum(target, draft).exp().sum(-1)


def expected_acceptance_rate(alphas: Sequence[Sequence[float]], num_assistant_tokens: int) -> float:
    """Return expected accepted / drafted tokens when a round may start at any position.

    Args:
        alphas: α of consecutive positions, one sequence a text.
        num_assistant_tokens: γ.
    """
    accepted = drafted = 0.0
    for text in alphas:
        for start in range(len(text) - num_assistant_tokens + 1):
            chance = 1.0
            for alpha in text[start : start + num_assistant_tokens]:
                chance *= alpha
                accepted += chance
            drafted += num_assistant_tokens
    return accepted / drafted if drafted else 0.0


@dataclass(frozen=True)
class TextAcceptance:
    """What draft and target say along one text the target wrote, position by position.

    Attributes:
        alphas: chance that a token drafted here is accepted and the text goes on (an accepted end
            token is not counted as accepted, as in the records of decoding).
        kept: chance that, had this position been drafted, the text's own token was the draft's:
            min(1, q/p) of that token.
        draft_ends: chance that the draft draws an end token here.
    """

    alphas: tuple[float, ...]
    kept: tuple[float, ...]
    draft_ends: tuple[float, ...]


@dataclass(frozen=True)
class ExpectedRounds:
    """Expected counts of decoding one or several texts with γ tokens drafted a round.

    Attributes:
        tokens: emitted tokens.
        rounds: forward passes of the target.
        drafted: for each place of a block, the rounds that drafted so far.
        accepted: for each place, the rounds that accepted up to there.
    """

    tokens: float
    rounds: float
    drafted: tuple[float, ...]
    accepted: tuple[float, ...]


def text_acceptance(
    target: PreTrainedModel,
    draft: PreTrainedModel,
    text: Continuation,
    temperature: float,
    ends: Collection[int],
) -> TextAcceptance:
    """Read a text with both models, one pass each.

    Args:
        target, draft: the pair; the draft's head may score fewer tokens than the target's.
        text: a text of the target's, with at least one token.
        temperature: T, above 0, of both.
        ends: the target's end tokens.
    """
    import torch

    with torch.inference_mode():
        raw = [_logits(model, text) for model in (target, draft)]
        width = raw[0].shape[-1]
        parts: list[list[float]] = [[], [], []]
        # A few positions at a time: [text, V] in float32 is gigabytes for a long text.
        for start in range(0, len(text.ids), 128):
            place = slice(start, start + 128)
            own = torch.tensor(text.ids[place], device=target.device)[:, None]
            scores = [
                _widened(one[place].to(target.device), model, width) / temperature
                for one, model in zip(raw, (target, draft), strict=True)
            ]
            p, q = (torch.log_softmax(one, -1) for one in scores)
            both = torch.minimum(p, q).exp()
            end = [e for e in ends if e < width]
            parts[0] += (both.sum(-1) - both[:, end].sum(-1)).clamp(0, 1).tolist()
            parts[1] += (q - p).gather(1, own)[:, 0].exp().clamp(max=1).tolist()
            parts[2] += q[:, end].exp().sum(-1).clamp(max=1).tolist()
    return TextAcceptance(*(tuple(part) for part in parts))


def _logits(model: PreTrainedModel, text: Continuation) -> torch.Tensor:
    """Return the logits [len(text.ids), V] that each token of the text was drawn from."""
    import torch

    inputs = torch.tensor([[*text.prompt_ids, *text.ids]], device=model.device)
    keep = len(text.ids) + 1
    logits: torch.Tensor = model(input_ids=inputs, logits_to_keep=keep).logits
    return logits[0, -keep:-1]


def _widened(logits: torch.Tensor, model: PreTrainedModel, width: int) -> torch.Tensor:
    """Return float32 logits of the target's width; tokens a head does not score get -inf."""
    import torch

    logits = logits.float()
    ids = getattr(model, "head_token_ids", getattr(model.config, "head_token_ids", None))
    if ids is None:
        if logits.shape[-1] >= width:
            return logits[:, :width]
        ids = range(logits.shape[-1])
    wide = logits.new_full((len(logits), width), float("-inf"))
    wide[:, torch.as_tensor(list(ids), device=logits.device)] = logits
    return wide


def expected_rounds(
    text: TextAcceptance, num_assistant_tokens: int, max_new_tokens: int
) -> ExpectedRounds:
    """Return what decoding a text is expected to count.

    Args:
        text: a text of the target's.
        num_assistant_tokens: γ.
        max_new_tokens: the length the text was written under; a round leaves room for the
            target's own token, so the last rounds draft less.
    """
    length = len(text.kept)
    starts = [0.0] * (length + num_assistant_tokens + 2)
    starts[0] = 1.0
    drafted, accepted = [0.0] * num_assistant_tokens, [0.0] * num_assistant_tokens
    for start in range(length):
        reached = drafting = starts[start]  # the target agrees so far; the draft still drafts
        if not reached:
            continue
        limit = max(0, min(num_assistant_tokens, max_new_tokens - start - 1))
        for place in range(limit):
            position = start + place
            drafted[place] += drafting
            if position >= length:  # the text has ended: nothing is accepted any more
                continue
            accepted[place] += reached * text.alphas[position]
            drafting -= reached * text.draft_ends[position]
            starts[position + 1] += reached * (1 - text.kept[position])
            reached *= text.kept[position]
            if position == length - 1:
                reached = 0.0
        starts[start + limit + 1] += reached
    return ExpectedRounds(length, sum(starts[:length]), tuple(drafted), tuple(accepted))


def add_rounds(parts: Sequence[ExpectedRounds]) -> ExpectedRounds:
    """Return the sum of counts that were made with one γ."""
    return ExpectedRounds(
        sum(p.tokens for p in parts),
        sum(p.rounds for p in parts),
        tuple(map(sum, zip(*(p.drafted for p in parts), strict=True))),
        tuple(map(sum, zip(*(p.accepted for p in parts), strict=True))),
    )


def rounds_acceptance_rate(parts: Sequence[ExpectedRounds]) -> float:
    """Return expected accepted / drafted tokens; 0 when nothing was drafted."""
    drafted = sum(sum(p.drafted) for p in parts)
    return sum(sum(p.accepted) for p in parts) / drafted if drafted else 0.0


def rounds_block_efficiency(parts: Sequence[ExpectedRounds]) -> float:
    """Return emitted tokens per expected forward pass of the target; 1 when there are none."""
    rounds = sum(p.rounds for p in parts)
    return sum(p.tokens for p in parts) / rounds if rounds else 1.0


def rounds_by_position(parts: Sequence[ExpectedRounds]) -> list[float]:
    """Return, for each place of a block, the expected share accepted up to there."""
    if not parts:
        return []
    total = add_rounds(parts)
    pairs = zip(total.accepted, total.drafted, strict=True)
    return [accepted / drafted if drafted else 0.0 for accepted, drafted in pairs]
