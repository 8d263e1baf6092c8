"""Expected acceptance, teacher-forced: fast, without decoding.

Given texts the target itself wrote at temperature T, the chance that a drafted token is accepted
at a position is α = Σ_v min(p_v, q_v), p and q being the target's and the draft's distributions
there at that temperature (Leviathan et al. 2023, arXiv 2211.17192, theorem 3.5). A round of γ
accepts α₁ + α₁α₂ + … tokens in expectation; here the draft reads the target's tokens instead of
its own, so the estimate stands in for decoding and is not the same.
"""

from __future__ import annotations

from collections.abc import Sequence
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
