"""Layers of the target, or of another model of its vocabulary, cut to the draft's widths."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastdraft_hf.draft.cutting import cut_layers, cut_vocabulary
from fastdraft_hf.draft.design import kept_layers_of, with_layers
from fastdraft_hf.draft.importance import block_influence, most_important
from fastdraft_hf.draft.init import register_method
from fastdraft_hf.draft.init.base import Method, Request
from fastdraft_hf.draft.vocabulary import check_vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@register_method
class Prune(Method):
    """``prune``: some layers of a model, with its vocabulary, narrower where the draft is.

    At the model's own width it is layer dropping. Below, families with RMSNorm before each block
    are rotated onto the principal directions of their vocabulary, as SliceGPT does (Ashkboos et
    al. 2024, arXiv 2401.15024), and others keep the weightiest channels.
    """

    name = "prune"

    def build(self, request: Request) -> tuple[PreTrainedModel, dict[str, Any]]:
        if request.design.donor is None:
            return prune(request, request.load(request.target), request.target)
        from fastdraft_hf.target.resolve import resolve_target

        donor = resolve_target(request.design.donor)
        check_vocabulary(
            request.target, donor.path, "design.donor", donor=True, resize=request.design.resize
        )
        model = request.load(donor.path)
        resize_rows(model, request.config.vocab_size)
        draft, facts = prune(request, model, donor.path)
        return draft, {"donor": donor.name, "donor_revision": donor.revision, **facts}


def prune(
    request: Request, model: PreTrainedModel, folder: Path
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Return the draft cut from ``model``, whose tokenizer lies in ``folder``, and facts."""
    source = model.config.get_text_config()
    layers, facts = _chosen_layers(request, model, folder)
    config = with_layers(copy.deepcopy(request.config), source, layers)
    draft = request.empty_draft(config)
    hidden = cut_vocabulary(model, draft)
    cut_layers(model, draft, hidden, layers)
    if hidden.basis is not None:
        facts["explained_variance"] = round(hidden.basis.share, 4)
    facts["layers_of_the_target"] = layers
    return draft, facts


def _chosen_layers(
    request: Request, model: PreTrainedModel, folder: Path
) -> tuple[list[int], dict[str, Any]]:
    design, kept = request.design, request.config.num_hidden_layers
    if isinstance(design.layers, list):
        return design.layers, {}
    if design.layers in ("even", "first"):
        source = model.config.get_text_config()
        return kept_layers_of(source, kept, first=design.layers == "first"), {}
    from transformers import AutoTokenizer

    influence = block_influence(model, AutoTokenizer.from_pretrained(folder))
    return most_important(influence, kept), {"block_influence": [round(i, 4) for i in influence]}


def resize_rows(model: PreTrainedModel, rows: int) -> None:
    """Give embeddings and head ``rows`` rows; new ones are the mean of the others."""
    import torch

    had = model.get_input_embeddings().weight.shape[0]
    if had == rows:
        return
    model.resize_token_embeddings(rows, mean_resizing=False)
    if rows > had:
        with torch.no_grad():
            for module in (model.get_input_embeddings(), model.get_output_embeddings()):
                module.weight[had:] = module.weight[:had].mean(0)


__all__ = ["Prune", "prune", "resize_rows"]
