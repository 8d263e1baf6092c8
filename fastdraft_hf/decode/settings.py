"""The measured settings of a draft, in its ``generation_config.json``.

transformers, our loop and `openvino_pipeline` read them there, so nobody needs to pass them.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import GenerationConfig


# Our own key: the draft's temperature over the target's (`fastdraft_hf.eval.draft_temperature`).
TEMPERATURE_RATIO = "assistant_temperature_ratio"


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
    config = _read(folder)
    apply_draft_settings(config, num_assistant_tokens)
    _write(config, folder)


def store_temperature_ratio(folder: Path, ratio: float) -> None:
    """Write the ratio of temperatures into a draft's folder; its other settings are kept."""
    config = _read(folder)
    setattr(config, TEMPERATURE_RATIO, ratio)
    _write(config, folder)


def _read(folder: Path) -> GenerationConfig:
    from transformers import GenerationConfig

    if not (folder / "generation_config.json").exists():
        return GenerationConfig()
    return GenerationConfig.from_pretrained(folder, _from_model_config=False)


def _write(config: GenerationConfig, folder: Path) -> None:
    # transformers marks a config that it derived from config.json, and reads such a one without the
    # keys that it does not know. It is a file of its own now.
    config._from_model_config = None
    config.save_pretrained(folder)


def read_draft_tokens(folder: Path) -> int | None:
    """Return γ of a draft's folder, or ``None`` when it has none."""
    number = _read(folder).num_assistant_tokens
    return None if number is None else int(number)
