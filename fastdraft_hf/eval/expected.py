"""Expected acceptance, teacher-forced: both models read a text once and nothing is decoded.

In a text that the target generated at temperature T, let p and q be the distributions of target and
draft at a position, at that temperature (the draft's may differ, see `fit_temperature_ratio`). A
drafted token is accepted there with probability α = Σ_v min(p_v, q_v) (Leviathan et al. 2023, arXiv
2211.17192, theorem 3.5). Given the emitted text x, the drafted token of position t was the accepted
one with probability

    a_t = min(1, q(x_t) / p(x_t)),

independently of other positions. `expected_rounds` follows the rounds of decoding with it: a
rejection or a fully accepted block ends a round, and a position of a block is reached with the
product of the a before it. Accepted tokens, rounds and emitted tokens have exactly the expectation
of decoding, for any γ.

Drafted tokens do not, quite: a draft that draws an end token after a token that will be rejected
stops its block early, which no text shows. They are overstated by at most γ - 2 per such round, and
the acceptance rate is a little too low. Logits processors are not considered.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

# Ratios of temperatures that are tried.
RATIOS = tuple(n / 20 for n in range(4, 25))  # 0.20 to 1.20
# Tokens that decide; with a large target or vocabulary more would take minutes.
ENOUGH = 2000


@dataclass(frozen=True)
class Continuation:
    """A text that the target generated: its prompt, and its own tokens."""

    task: str
    prompt_ids: tuple[int, ...]
    ids: tuple[int, ...]


@dataclass(frozen=True)
class TextAcceptance:
    """Probabilities along one text, position by position.

    Attributes:
        alphas: that a token drafted here is accepted and, as in records, is no end token.
        kept: that the text's own token was the drafted one, if one was drafted: min(1, q/p).
        draft_ends: that the draft draws an end token here.
    """

    alphas: tuple[float, ...]
    kept: tuple[float, ...]
    draft_ends: tuple[float, ...]


class ExpectedRounds(NamedTuple):
    """Expected counts of decoding one or several texts, named as in `DecodingRecord`."""

    new_tokens: float
    target_passes: float
    drafted: float
    accepted: float


def text_acceptance(
    target: PreTrainedModel,
    draft: PreTrainedModel,
    text: Continuation,
    temperature: float,
    ends: Collection[int],
    temperature_ratio: float = 1.0,
) -> TextAcceptance:
    """Read a text with both models, one forward pass each.

    The draft's head may score fewer tokens than the target's. ``ends`` are the target's end tokens;
    the draft's temperature is ``temperature_ratio`` times the target's, which is above 0.
    """
    import torch

    parts: list[list[float]] = [[], [], []]
    start = 0
    for p, q in aligned_logits(target, draft, text):
        own = torch.tensor(text.ids[start : start + len(p)], device=p.device)[:, None]
        start += len(p)
        end = [e for e in ends if e < p.shape[-1]]
        p = torch.log_softmax(p / temperature, -1)
        q = torch.log_softmax(q / (temperature * temperature_ratio), -1)
        both = torch.minimum(p, q).exp()
        parts[0] += (both.sum(-1) - both[:, end].sum(-1)).clamp(0, 1).tolist()
        parts[1] += (q - p).gather(1, own)[:, 0].exp().clamp(max=1).tolist()
        parts[2] += q[:, end].exp().sum(-1).clamp(max=1).tolist()
    return TextAcceptance(*(tuple(part) for part in parts))


def aligned_logits(
    target: PreTrainedModel, draft: PreTrainedModel, text: Continuation
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield both models' float32 logits [n, V] of a text's own tokens, in pieces of up to 128.

    Both are on the target's device and as wide as its head. Whole, they would be gigabytes for a
    long text.
    """
    import torch

    from fastdraft_hf.decode.scores import widen
    from fastdraft_hf.decode.speculative import head_token_ids

    def read(model: PreTrainedModel) -> torch.Tensor:
        """Return the logits [n, V] that the tokens of the text were drawn from."""
        inputs = torch.tensor([[*text.prompt_ids, *text.ids]], device=model.device)
        keep = len(text.ids) + 1
        logits: torch.Tensor = model(input_ids=inputs, logits_to_keep=keep).logits
        return logits[0, -keep:-1].to(target.device)

    if not text.ids:
        return
    with torch.inference_mode():
        p, q, ids = read(target), read(draft), head_token_ids(draft)
        ids = None if ids is None else ids.to(p.device)
        for a, b in zip(torch.split(p, 128), torch.split(q, 128), strict=True):
            yield a.float(), widen(b, ids, p.shape[-1])


def expected_rounds(
    text: TextAcceptance, num_assistant_tokens: int, max_new_tokens: int
) -> ExpectedRounds:
    """Return the expected counts of decoding a text.

    ``max_new_tokens`` is the limit that the text was written under; a round leaves room for the
    target's own token, so the last rounds draft less.
    """
    length = len(text.kept)
    starts = [0.0] * (length + num_assistant_tokens + 2)
    starts[0] = 1.0
    drafted = accepted = 0.0
    for start in range(length):
        reached = drafting = starts[start]  # the target agrees so far; the draft still drafts
        if not reached:
            continue
        limit = max(0, min(num_assistant_tokens, max_new_tokens - start - 1))
        for step in range(limit):
            position = start + step
            drafted += drafting
            if position >= length:  # the text has ended: nothing more is accepted
                continue
            accepted += reached * text.alphas[position]
            drafting -= reached * text.draft_ends[position]
            starts[position + 1] += reached * (1 - text.kept[position])
            reached *= text.kept[position]
            if position == length - 1:
                reached = 0.0
        starts[start + limit + 1] += reached
    return ExpectedRounds(length, sum(starts[:length]), drafted, accepted)


def add_rounds(parts: Sequence[ExpectedRounds]) -> ExpectedRounds:
    """Return the sum of counts."""
    return ExpectedRounds(*map(sum, zip(*parts, strict=True)))


def fit_temperature_ratio(
    target: PreTrainedModel,
    draft: PreTrainedModel,
    texts: Sequence[Continuation],
    temperature: float,
) -> dict[str, float]:
    """Choose how much sharper than the target the draft samples: the ratio of their temperatures.

    The target's text does not depend on q, so q may be chosen for speed. A draft much smaller than
    its target is less sure at the same temperature, and more of its tokens are accepted when it
    samples at a lower one. The expected acceptance of a drafted token, Σ_v min(p_v, q_v), decides.

    The texts are the target's, at temperature ``temperature``, and neither training nor evaluation
    reads them. No more are read than the first with `ENOUGH` tokens in all.

    Returns:
        ``temperature_ratio``, the best of `RATIOS`; ``acceptance`` with it and ``acceptance_at_1``
        on these texts, means over tokens; ``tokens``, their number.
    """
    import torch

    sums, tokens = torch.zeros(len(RATIOS), dtype=torch.float64), 0
    for text in texts:
        if tokens >= ENOUGH:
            break
        tokens += len(text.ids)
        for p, q in aligned_logits(target, draft, text):
            p = (p / temperature).softmax(-1)
            for number, ratio in enumerate(RATIOS):
                both = torch.minimum(p, (q / (temperature * ratio)).softmax(-1))
                sums[number] += both.sum().double().cpu()
    means = (sums / max(tokens, 1)).tolist()
    # Ties go to the ratio nearest to 1.
    best = max(range(len(RATIOS)), key=lambda n: (means[n], -abs(RATIOS[n] - 1)))
    return {
        "temperature_ratio": RATIOS[best],
        "acceptance": means[best],
        "acceptance_at_1": means[RATIOS.index(1.0)],
        "tokens": tokens,
    }
