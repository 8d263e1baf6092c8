"""How much sharper than the target a draft should sample: the ratio of their temperatures.

The target's text does not depend on the distribution q that the draft samples from, so q may be
chosen for speed. A draft much smaller than its target is less sure at the same temperature T, and
more of its tokens are accepted when it samples at a lower one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fastdraft_hf.eval.expected import Continuation, aligned_logits

if TYPE_CHECKING:
    from transformers import PreTrainedModel

RATIOS = tuple(n / 20 for n in range(10, 25))  # 0.50 to 1.20


def fit_temperature_ratio(
    target: PreTrainedModel,
    draft: PreTrainedModel,
    texts: Sequence[Continuation],
    temperature: float,
) -> dict[str, float]:
    """Choose the ratio by the expected acceptance of a drafted token, Σ_v min(p_v, q_v).

    Args:
        target, draft: the pair.
        texts: texts of the target's that neither training nor evaluation reads.
        temperature: T of the target, above 0.

    Returns:
        ``temperature_ratio``, the best of `RATIOS`; ``acceptance`` with it and ``acceptance_at_1``
        on these texts, means over tokens; ``tokens``, their number.
    """
    import torch

    sums = torch.zeros(len(RATIOS), dtype=torch.float64)
    for text in texts:
        for p, q in aligned_logits(target, draft, text):
            p = (p / temperature).softmax(-1)
            for number, ratio in enumerate(RATIOS):
                both = torch.minimum(p, (q / (temperature * ratio)).softmax(-1))
                sums[number] += both.sum().double().cpu()
    tokens = sum(len(text.ids) for text in texts)
    means = (sums / max(tokens, 1)).tolist()
    # Ties go to the ratio nearest to 1.
    best = max(range(len(RATIOS)), key=lambda n: (means[n], -abs(RATIOS[n] - 1)))
    return {
        "temperature_ratio": RATIOS[best],
        "acceptance": means[best],
        "acceptance_at_1": means[RATIOS.index(1.0)],
        "tokens": tokens,
    }
