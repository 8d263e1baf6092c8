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
# Feed-forward widths that models have, as multiples of the width; a shallow draft of a small
# budget needs far more than the usual 2 to 8 to fill it.
NARROWEST, WIDEST = 1, 24
# Feed-forward widths are multiples of the first, where that fills a budget closely enough.
_STEPS = (32, 8)
# Designs may miss the budget by this share at most, to be of one budget; those cut from the target
# have feed-forward layers no wider than the target's, and miss it by more.
_TOLERANCE, _CUT_TOLERANCE = 0.02, 0.1


@dataclass(frozen=True)
class Design:
    """One shape.

    Attributes:
        layers, width, feed_forward: its sizes.
        params: exact number of parameters.
    """

    layers: int
    width: int
    feed_forward: int
    params: int

    @property
    def name(self) -> str:
        return f"{self.layers}x{self.width}"

    def section(self, config: TuneConfig) -> dict[str, Any]:
        """Return the fields of a recipe's section ``design`` that give this shape."""
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
        FastDraftError: a depth that was asked for cannot be had, or nothing fits the budget.
    """
    text = target.get_text_config()
    asked = config.depths is not None
    depths = config.depths or [d for d in DEPTHS if d <= text.num_hidden_layers]
    found: list[Design] = []
    for depth in depths:
        if depth > text.num_hidden_layers:
            raise FastDraftError(
                f"depths: {depth} is deeper than the target's {text.num_hidden_layers}"
            )
        fitting = [
            design
            for width in range(config.width_multiple, text.hidden_size + 1, config.width_multiple)
            if (design := _filled(target, config, depth, width)) is not None
        ]
        if not fitting and asked:
            raise FastDraftError(
                f"depths: no draft of {depth} layers fills {config.params:,} parameters with "
                f"feed-forward layers of {NARROWEST} to {WIDEST} times its width"
            )
        found += _spread(fitting[::-1], config.widths_per_depth)
    if not found:
        # The design's own message says what the least is.
        design_draft(target, DesignConfig(params=config.params, init=config.init))
        raise FastDraftError(f"params: no draft of {config.params:,} parameters can be designed")
    return found


def _filled(target: Any, config: TuneConfig, depth: int, width: int) -> Design | None:
    """Return the design of this depth and width that fills the budget; ``None`` without one."""

    def params(feed_forward: int) -> int:
        section = Design(depth, width, feed_forward, 0)
        return count_parameters(draft_config(target, section, config))

    for unit in _STEPS:
        try:
            least = params(unit)
            step = params(2 * unit) - least
        except FastDraftError:  # this family has no such width
            return None
        if least > config.params or step <= 0:
            continue
        feed_forward, tolerance = unit * (1 + (config.params - least) // step), _TOLERANCE
        if not NARROWEST * width <= feed_forward <= WIDEST * width:
            continue
        try:
            exact = params(feed_forward)
        except FastDraftError:  # initialization that are cut from the target cannot be wider
            feed_forward = int(target.get_text_config().intermediate_size)
            exact, tolerance = params(feed_forward), _CUT_TOLERANCE
        if abs(exact - config.params) <= tolerance * config.params:
            return Design(depth, width, feed_forward, exact)
    return None


def _spread(designs: list[Design], count: int) -> list[Design]:
    """Return ``count`` of them, evenly spaced, the first and last included."""
    if len(designs) <= count:
        return designs
    if count == 1:
        return designs[:1]
    places = [round(n * (len(designs) - 1) / (count - 1)) for n in range(count)]
    return [designs[place] for place in places]
