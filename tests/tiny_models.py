"""What fixtures and tests do to tiny models; pytest puts this folder on the path."""

from typing import Any

import torch

# The ids of a reduced vocabulary: every second token, so that columns and ids differ everywhere.
KEPT = tuple(range(0, 288, 2))


def noisy(model: Any, amount: float = 0.1, seed: int = 0) -> Any:
    """Put a little noise on a model's weights."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(amount * parameter.std() * noise if parameter.dim() > 1 else 0)
    return model
