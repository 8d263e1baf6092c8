"""What several tests of this folder call; pytest puts the folder on the path."""

from __future__ import annotations

from typing import Any

import torch

from fastdraft_hf import assisted_decoding
from fastdraft_hf.decoding.assisted import set_draft_length


def noisy(model: Any, amount: float = 0.1, seed: int = 0) -> Any:
    """Put a little noise on a model's weights."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(amount * parameter.std() * noise if parameter.dim() > 1 else 0)
    return model


def write(target: Any, ids: Any, draft: Any = None, gamma: int = 3, **given: Any) -> Any:
    """Call ``generate``, through our loop when a draft is given."""
    ids = torch.as_tensor(ids)
    fields: dict[str, Any] = {"do_sample": False, "max_new_tokens": 12, **given}
    if "attention_mask" not in fields:
        fields["attention_mask"] = torch.ones_like(ids)
    if draft is not None:
        set_draft_length(draft, gamma)
        fields |= {"assistant_model": draft, "custom_generate": assisted_decoding}
    return target.generate(ids, **fields)
