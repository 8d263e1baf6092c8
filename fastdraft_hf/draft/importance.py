"""Which layers of a model matter: how much each turns the hidden states (block influence)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fastdraft_hf.draft.parts import decoder_of

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# A little of what drafts are asked for: an explanation, a list, a story, code, and a dialogue.
TEXTS = (
    "Bread rises because yeast turns sugar into gas, and the dough is tough enough to hold it. "
    "Warm water wakes the yeast, and kneading makes the dough stretch instead of tear.",
    "To repair a flat tyre:\n1. Take the wheel off.\n2. Lift the tyre from the rim.\n3. Find the "
    "hole in the tube.\n4. Sand it, glue it and press the patch on.\n5. Put everything back.",
    "The lighthouse keeper counted the ships each evening. That night one more came than he had "
    "counted the day before, and no lamp burned on it.",
    "def mean(values):\n    total = 0.0\n    for value in values:\n        total += value\n"
    "    return total / len(values) if values else None\n\n\nclass Stack:\n"
    "    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n"
    "        self.items.append(item)\n",
    "Q: Which is heavier, a litre of oil or a litre of water?\nA: The water. Oil floats on it, so "
    "the same volume of oil weighs less, by about a tenth.",
)


def block_influence(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str] = TEXTS
) -> list[float]:
    """Return, for each layer, 1 − cos(hidden states before, after), averaged over the tokens.

    The measure of ShortGPT (Men et al. 2024, arXiv 2403.03853): a layer near 0 hardly changes
    anything. One forward pass a text.
    """
    import torch

    layers = decoder_of(model).layers
    sums, tokens = [0.0] * len(layers), 0

    def hook(index: int) -> Any:
        def measure(_: Any, args: Any, kwargs: Any, output: Any) -> None:
            before: torch.Tensor = args[0] if args else kwargs["hidden_states"]
            after = output[0] if isinstance(output, tuple) else output
            cosine = torch.cosine_similarity(before.float(), after.float(), dim=-1)
            sums[index] += float((1 - cosine).sum())

        return measure

    handles = [
        layer.register_forward_hook(hook(i), with_kwargs=True) for i, layer in enumerate(layers)
    ]
    try:
        with torch.inference_mode():
            for text in texts:
                ids = tokenizer(text, return_tensors="pt").input_ids.to(model.device)
                tokens += int(ids.numel())
                decoder_of(model)(input_ids=ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return [total / tokens for total in sums]


def most_important(influence: Sequence[float], kept: int) -> list[int]:
    """Return the indices of the ``kept`` layers of largest influence, in their order."""
    order = sorted(range(len(influence)), key=lambda i: (-influence[i], i))
    return sorted(order[:kept])
