"""What a kind of initialization is: a name and a function that builds the draft."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from fastdraft_hf.draft.config import DesignConfig

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class Request:
    """What is to be built.

    Attributes:
        target: the target's folder.
        config: the draft's config.
        design: what the recipe says.
        seed: of random weights.
    """

    target: Path
    config: PretrainedConfig
    design: DesignConfig
    seed: int

    def empty_draft(self, config: PretrainedConfig | None = None) -> PreTrainedModel:
        """Return the draft with random weights, in float32."""
        import torch
        from transformers import AutoModelForCausalLM, set_seed

        set_seed(self.seed)
        config = copy.deepcopy(config or self.config)
        config.dtype = torch.float32  # a family may make buffers of it, whatever is asked for
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)

    def load(self, folder: Path) -> PreTrainedModel:
        """Return a model in float32, without dropout."""
        import torch
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, use_safetensors=True, trust_remote_code=False
        )
        return model.eval()


class Method(ABC):
    """One kind of initialization."""

    name: ClassVar[str]

    @abstractmethod
    def build(self, request: Request) -> tuple[PreTrainedModel, dict[str, Any]]:
        """Return the draft in float32, and facts about how it was made."""
