"""How much a draft drafts, and its measured settings, in its ``generation_config.json``.

transformers, our loop and `openvino_pipeline` read them there, so nobody needs to pass them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import GenerationConfig

    from fastdraft_hf.decode.length import DraftLength


# Our own key: the draft's temperature over the target's (`fit_temperature_ratio`).
TEMPERATURE_RATIO = "assistant_temperature_ratio"
# Our own key, named as in vLLM's n-gram speculation: so many of the last tokens must have stood in
# the text before, for what followed them to be copied instead of drafted; 0 never copies.
PROMPT_LOOKUP_MIN = "prompt_lookup_min"
# What our drafts are published with; benchmarks/prompt_lookup.py measures it.
LOOKUP = 3


@dataclass
class Drafting:
    """How much to draft.

    Attributes:
        num_assistant_tokens: γ at the start.
        schedule: ``constant``; or ``heuristic`` and ``heuristic_transient``: two more after a
            round whose drafts were all accepted, one fewer after any other; or ``cost``, see
            `by_cost`.
        threshold: drafting stops after a token to which the draft gives less probability.
        max_positions: positions that the draft can read; beyond them the target decodes alone.
        temperature_ratio: when sampling, the draft's scores are divided by it.
        by_cost: decides the length instead of γ.
        mask_token: stands for a token to come, in a draft that drafts all of a block in one pass.
        prompt_lookup_min: see `PROMPT_LOOKUP_MIN`.
    """

    num_assistant_tokens: int
    schedule: str = "constant"
    threshold: float = 0.0
    max_positions: int | None = None
    temperature_ratio: float = 1.0
    by_cost: DraftLength | None = None
    mask_token: int | None = None
    prompt_lookup_min: int = 0

    def adapt(self, all_accepted: bool) -> None:
        if self.schedule in ("heuristic", "heuristic_transient"):
            number = self.num_assistant_tokens
            self.num_assistant_tokens = number + 2 if all_accepted else max(1, number - 1)


def set_draft_length(
    config: GenerationConfig, num_assistant_tokens: int, prompt_lookup_min: int = 0
) -> None:
    """Make a draft with this generation config propose exactly so many tokens per round.

    transformers reads them there and ignores what is passed to the target's ``generate``. Only our
    loop copies (`PROMPT_LOOKUP_MIN`).
    """
    config.num_assistant_tokens = num_assistant_tokens
    config.num_assistant_tokens_schedule = "constant"
    config.assistant_confidence_threshold = 0.0
    setattr(config, PROMPT_LOOKUP_MIN, prompt_lookup_min)


def store_draft_settings(
    folder: Path, num_assistant_tokens: int | None = None, temperature_ratio: float | None = None
) -> None:
    """Write measured settings into the folder of a draft, PyTorch or OpenVINO; keep the others.

    With γ comes what our loop copies (`LOOKUP`), as it was measured.
    """
    config = _read(folder)
    if num_assistant_tokens is not None:
        set_draft_length(config, num_assistant_tokens, LOOKUP)
    if temperature_ratio is not None:
        setattr(config, TEMPERATURE_RATIO, temperature_ratio)
    # transformers marks a config that it derived from config.json, and reads such a one without the
    # keys that it does not know. It is a file of its own now.
    config._from_model_config = None
    config.save_pretrained(folder)


def _read(folder: Path) -> GenerationConfig:
    from transformers import GenerationConfig

    if not (folder / "generation_config.json").exists():
        return GenerationConfig()
    return GenerationConfig.from_pretrained(folder, _from_model_config=False)


def read_draft_tokens(folder: Path) -> int | None:
    """Return γ of a draft's folder, or ``None`` when it has none."""
    number = _read(folder).num_assistant_tokens
    return None if number is None else int(number)
