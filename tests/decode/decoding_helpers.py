"""What several tests of this folder call; pytest puts the folder on the path."""

from __future__ import annotations

from typing import Any

import torch

from fastdraft_hf import assisted_decoding
from fastdraft_hf.decode.assisted import set_draft_length


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
