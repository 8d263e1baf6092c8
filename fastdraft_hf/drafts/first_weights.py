"""A draft's weights before training: random, or with the target's vocabulary projected in.

A draft is mostly vocabulary, so what its embeddings know at the start decides how much a small
token budget gives. ``project`` gives each token the position that the target gives it, as far as
the draft's width can hold it.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastdraft_hf.drafts.config import DesignConfig

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel

# Root mean square of projected embeddings, and spread of the logits they give a hidden state of
# unit RMS. Of the values tried, these trained best (`benchmarks/quickstart_choices.py`).
EMBEDDING_RMS = 0.04
LOGIT_SPREAD = 2.0


def first_weights(
    target: Path, config: PretrainedConfig, design: DesignConfig, seed: int
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Build a draft in float32 with its first weights.

    Args:
        target: the target's folder; read by ``project`` only.
        config: the draft's config.
        design: which first weights.
        seed: of the random ones.

    Returns:
        the draft, and facts about how it was made.
    """
    import torch
    from transformers import AutoModelForCausalLM, set_seed

    set_seed(seed)
    draft = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    facts: dict[str, Any] = {"first_weights": design.first_weights}
    if design.first_weights == "project":
        model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
        facts["explained_variance"] = round(project_vocabulary(model, draft), 4)
    draft.config.dtype = "float32"
    return draft, facts


def project_vocabulary(target: PreTrainedModel, draft: PreTrainedModel) -> float:
    """Set the draft's embeddings and head from the target's, by principal components.

    With E [V, D] the target's head and g [D] the gain of its final norm, the head sees E·diag(g).
    For tied embeddings both uses of the table are kept at once by E·diag(√|g|); its d leading
    right singular vectors are the basis of the draft's hidden states. Only inner products matter
    to a transformer, so a rotation loses nothing but the components left out.

    Returns:
        the share of the head's variance that the draft's width holds.
    """
    import torch

    with torch.no_grad():
        gain = _final_norm(target).weight.float().abs().clamp_min(1e-4)
        embeddings = target.get_input_embeddings().weight.float()
        head = target.get_output_embeddings().weight.float()
        tied = target.config.get_text_config().tie_word_embeddings
        width = draft.get_input_embeddings().weight.shape[1]
        scaled_head = head * (gain.sqrt() if tied else gain)
        basis, share = principal_basis(scaled_head, width)
        table = scaled_head @ basis
        table *= EMBEDDING_RMS / table.square().mean().sqrt()
        draft.get_output_embeddings().weight.copy_(table)
        if not tied:
            inputs = embeddings @ basis
            inputs *= EMBEDDING_RMS / inputs.square().mean().sqrt()
            draft.get_input_embeddings().weight.copy_(inputs)
        _final_norm(draft).weight.fill_(LOGIT_SPREAD / (EMBEDDING_RMS * math.sqrt(width)))
    return share


def principal_basis(table: torch.Tensor, width: int) -> tuple[torch.Tensor, float]:
    """Return the ``width`` leading right singular vectors of ``table`` [V, D] as [D, width].

    The second value is the share of the table's sum of squares that they span.
    """
    import torch

    values, vectors = torch.linalg.eigh((table.T @ table).double())
    share = float(values[-width:].sum() / values.sum())
    return vectors.flip(1)[:, :width].to(table.dtype), share


def _final_norm(model: PreTrainedModel) -> Any:
    decoder: Any = model.get_decoder()
    return decoder.norm
