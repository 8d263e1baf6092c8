"""What several tests of this folder call; pytest puts the folder on the path."""

from pathlib import Path
from typing import Any

import torch

from fastdraft_hf import assisted_decoding
from fastdraft_hf._ties import greedy_margin
from fastdraft_hf.decode.length import Learned
from fastdraft_hf.decode.settings import set_draft_length
from fastdraft_hf.export.parity import EXACT

# Of the models whose samples are counted.
VOCABULARY = 6


def load_openvino(folder: Path, **config: str) -> Any:
    """Load an OpenVINO model that rounds nothing, or one with the device's properties given."""
    from optimum.intel import OVModelForCausalLM

    return OVModelForCausalLM.from_pretrained(folder, ov_config=config or EXACT)


def padded(prompts: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and mask of prompts, padded on the left with 0."""
    length = max(map(len, prompts))
    ids = torch.tensor([[0] * (length - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (length - len(p)) + [1] * len(p) for p in prompts])
    return ids, mask


def write(
    target: Any, ids: Any, draft: Any = None, gamma: int | str = 3, copies: int = 0, **given: Any
) -> Any:
    """Call ``generate``, through our loop when a draft is given, with a γ or a schedule of it.

    With ``copies``, prompt lookup copies where so many tokens stood in the text before.
    """
    ids = torch.as_tensor(ids)
    fields: dict[str, Any] = {"do_sample": False, "max_new_tokens": 12, **given}
    if "attention_mask" not in fields:
        fields["attention_mask"] = torch.ones_like(ids)
    if draft is not None:
        number = 3 if isinstance(gamma, str) else gamma
        set_draft_length(draft.generation_config, number, copies)
        if isinstance(gamma, str):
            draft.generation_config.num_assistant_tokens_schedule = gamma
        fields |= {"assistant_model": draft, "custom_generate": assisted_decoding}
    return target.generate(ids, **fields)


def assert_equal_or_tied(target: Any, alone: torch.Tensor, ours: torch.Tensor) -> None:
    """Two kernels may round a tie of the target's own logits apart; nothing else may differ."""
    one, other = alone[0].tolist(), ours[0].tolist()
    if one != other[: len(one)]:
        end = next(n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
        assert greedy_margin(target, one[:end]).tie


class Known:
    """Times that are known and not measured."""

    weight, change = 9.0, 0.0

    def __init__(self, base: float, each: float) -> None:
        self.base, self.each = base, each

    def add(self, n: int, seconds: float, changed: bool = False) -> None: ...

    def __call__(self, n: int) -> float:
        return self.base + self.each * n


def learned(draft: float = 0.1, each: float = 0.1) -> Learned:
    """Times in passes of the target over one token."""
    found: Any = Learned()
    found.target, found.draft = Known(1, each), Known(draft, 0)
    return found
