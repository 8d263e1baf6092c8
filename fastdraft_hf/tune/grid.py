"""Drafts of one parameter budget over depth and width.

Depth and width are chosen, and the feed-forward layers fill what the budget leaves.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastdraft_hf._errors import FastDraftError
from fastdraft_hf.draft.config import DesignConfig
from fastdraft_hf.draft.design import design_draft
from fastdraft_hf.draft.sizes import count_parameters
from fastdraft_hf.tune.config import TuneConfig

if TYPE_CHECKING:
    from transformers import PretrainedConfig

DEPTHS = (1, 2, 4, 8, 12)
# Feed-forward sizes as multiples of the width. A shallow draft of a small budget needs far more
# than the usual 2 to 8 to fill it.
NARROWEST, WIDEST = 1, 24
# Widths and feed-forward sizes are multiples of these.
_WIDTH_STEP, _STEP = 16, 8
# How far a design may miss the budget. Those cut from the target have feed-forward layers no wider
# than the target's and miss it by more.
_TOLERANCE, _CUT_TOLERANCE = 0.02, 0.1


@dataclass(frozen=True)
class Design:
    """One shape: layers, width, feed-forward size and exact number of parameters."""

    layers: int
    width: int
    feed_forward: int
    params: int

    @property
    def name(self) -> str:
        return f"{self.layers}x{self.width}"

    def section(self, config: TuneConfig) -> dict[str, Any]:
        """Return the section ``design`` of a recipe that gives this shape."""
        return {
            "params": config.params,
            "num_hidden_layers": self.layers,
            "hidden_size": self.width,
            "intermediate_size": self.feed_forward,
            "init": config.init,
        }


def draft_config(target: PretrainedConfig, design: Design, config: TuneConfig) -> PretrainedConfig:
    """Return the draft's config for a shape."""
    return design_draft(target, DesignConfig(**design.section(config)))


def designs_of(target: PretrainedConfig, config: TuneConfig) -> list[Design]:
    """Return the shapes to time, by depth and then from wide to narrow.

    Raises:
        FastDraftError: a requested depth is impossible, or nothing fits the budget.
    """
    text = target.get_text_config()
    found: list[Design] = []
    for depth in config.depths or [d for d in DEPTHS if d <= text.num_hidden_layers]:
        if depth > text.num_hidden_layers:
            raise FastDraftError(
                f"depths: {depth} is deeper than the target's {text.num_hidden_layers} layers"
            )
        widths = range(_WIDTH_STEP, text.hidden_size + 1, _WIDTH_STEP)
        filled = [_filled(target, config, depth, width) for width in reversed(widths)]
        fitting = [design for design in filled if design is not None]
        if not fitting and config.depths is not None:
            raise FastDraftError(
                f"depths: no draft of {depth} layers fills {config.params:,} parameters with "
                f"feed-forward layers of {NARROWEST} to {WIDEST} times its width"
            )
        # Evenly spaced, the widest and the narrowest included.
        count = min(config.widths_per_depth, len(fitting))
        found += [fitting[n * (len(fitting) - 1) // max(count - 1, 1)] for n in range(count)]
    if not found:
        # The design's own message names the smallest budget.
        design_draft(target, DesignConfig(params=config.params, init=config.init))
        raise FastDraftError(f"params: no draft of {config.params:,} parameters can be designed")
    return found


def _filled(target: Any, config: TuneConfig, depth: int, width: int) -> Design | None:
    """Return the design of this depth and width that fills the budget, or ``None``."""
    text = target.get_text_config()
    widest = WIDEST * width if config.init != "prune" else text.intermediate_size

    def params(feed_forward: int) -> int:
        return count_parameters(draft_config(target, Design(depth, width, feed_forward, 0), config))

    try:
        least = params(_STEP)
        step = params(2 * _STEP) - least
    except FastDraftError:  # this family has no such width
        return None
    feed_forward = min(_STEP * (1 + (config.params - least) // step), widest)
    if not NARROWEST * width <= feed_forward <= WIDEST * width:
        return None
    exact = params(feed_forward)
    tolerance = _TOLERANCE if config.init != "prune" else _CUT_TOLERANCE
    close = abs(exact - config.params) <= tolerance * config.params
    return Design(depth, width, feed_forward, exact) if close else None
