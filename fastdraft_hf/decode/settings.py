"""The measured settings of a draft, in its ``generation_config.json``.

transformers, our loop and `openvino_pipeline` read them there, so nobody needs to pass them.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import GenerationConfig


def apply_draft_settings(config: GenerationConfig, num_assistant_tokens: int) -> None:
    """Set γ, a schedule that never changes it, and a threshold that cuts no block short."""
    config.num_assistant_tokens = num_assistant_tokens
    config.num_assistant_tokens_schedule = "constant"
    config.assistant_confidence_threshold = 0.0


def store_draft_settings(folder: Path, num_assistant_tokens: int) -> None:
    """Write γ, the constant schedule and threshold 0 into a draft's folder.

    Args:
        folder: of the draft, PyTorch or OpenVINO. Its other settings are kept.
        num_assistant_tokens: the measured γ.
    """
    from transformers import GenerationConfig

    if (folder / "generation_config.json").exists():
        config = GenerationConfig.from_pretrained(folder)
    else:
        config = GenerationConfig()
    apply_draft_settings(config, num_assistant_tokens)
    config.save_pretrained(folder)


def read_draft_tokens(folder: Path) -> int | None:
    """Return γ of a draft's folder, or ``None`` when it has none."""
    from transformers import GenerationConfig

    if not (folder / "generation_config.json").exists():
        return None
    number = GenerationConfig.from_pretrained(folder).num_assistant_tokens
    return None if number is None else int(number)
