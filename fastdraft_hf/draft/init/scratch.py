"""Random weights, as in the paper (arXiv 2411.11055)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastdraft_hf.draft.init import register_method
from fastdraft_hf.draft.init.base import Method, Request

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@register_method
class Scratch(Method):
    """``scratch``: what transformers initialises a model of this config with."""

    name = "scratch"

    def build(self, request: Request) -> tuple[PreTrainedModel, dict[str, Any]]:
        return request.empty_draft(), {}
