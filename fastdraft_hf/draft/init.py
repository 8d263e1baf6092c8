"""The initializations of a draft: random, or with what another model knows.

A draft is mostly vocabulary, so what its embeddings know at the start decides how far a small token
budget goes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fastdraft_hf.draft.basis import project_vocabulary, vocabulary_basis
from fastdraft_hf.draft.config import DesignConfig
from fastdraft_hf.draft.cutting import (
    block_influence,
    cut_layers,
    cut_vocabulary,
    kept_layers_of,
    most_important,
)
from fastdraft_hf.draft.design import with_layers
from fastdraft_hf.draft.token_spelling import TokenMatches, match_tokens
from fastdraft_hf.draft.vocabulary import check_vocabulary

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel

    Built = tuple[PreTrainedModel, dict[str, Any]]


class _Request(NamedTuple):
    """The arguments of `init`."""

    target: Path | PreTrainedModel
    config: PretrainedConfig
    design: DesignConfig
    seed: int


def init(
    target: Path | PreTrainedModel, config: PretrainedConfig, design: DesignConfig, seed: int
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Build a draft in float32 with its initialization.

    Args:
        target: the target's folder, or the loaded target; not read for ``scratch``.
        config: the draft's config, from `design_draft` with the same ``design``.
        design: which initialization, and from where.
        seed: of the random weights.

    Returns:
        the draft, and facts about how it was made.

    Raises:
        FastDraftError: the donor's vocabulary or family does not allow it.
    """
    draft, facts = METHODS[design.init](_Request(target, config, design, seed))
    draft.config.dtype = "float32"
    return draft, {"init": design.init, **facts}


def _scratch(request: _Request) -> Built:
    """Leave every weight random, as in the paper (arXiv 2411.11055)."""
    return _random_draft(request, request.config), {}


def _project(request: _Request) -> Built:
    """Project the target's embeddings and head; leave the layers random."""
    draft = _random_draft(request, request.config)
    target = _load(request.target)
    basis = vocabulary_basis(target, request.config.hidden_size)
    project_vocabulary(target, draft, basis)
    return draft, {"explained_variance": round(basis.share, 4)}


def _prune(request: _Request) -> Built:
    """Cut some layers of the target, or of a donor with its vocabulary, to the draft's widths.

    At the model's own width this drops layers. Below, families with an RMSNorm before each block
    are rotated onto the principal directions of their vocabulary, as SliceGPT does (Ashkboos et
    al. 2024, arXiv 2401.15024), and others keep the channels with the largest weights.
    """
    from fastdraft_hf.target.resolve import resolve_target

    if request.design.donor is None:
        return _cut(request, _load(request.target), request.target)
    donor = resolve_target(request.design.donor, key="design.donor")
    target = request.target
    check_vocabulary(
        target if isinstance(target, Path) else Path(target.name_or_path),
        donor.path,
        "design.donor",
        donor=True,
        resize=request.design.resize,
    )
    model = _load(donor.path)
    resize_rows(model, request.config.vocab_size)
    draft, facts = _cut(request, model, donor.path)
    return draft, {"donor": donor.name, "donor_revision": donor.revision, **facts}


def _transplant(request: _Request) -> Built:
    """Cut a donor with another tokenizer, its embeddings mapped to the target's tokens.

    A token's embedding is the mean over the pieces that the donor's tokenizer splits its text into.
    The layers are then cut as `prune` cuts them.
    """
    from fastdraft_hf.target.resolve import load_tokenizer, resolve_target

    assert request.design.donor is not None
    donor = resolve_target(request.design.donor, key="design.donor")
    matches = match_tokens(
        load_tokenizer(_folder_of(request.target), "target"),
        load_tokenizer(donor.path, "design.donor"),
        request.design.token_map,
    )
    model = _load(donor.path)
    replace_vocabulary(model, matches, request.config.vocab_size)
    draft, facts = _cut(request, model, donor.path)
    return draft, {
        "donor": donor.name,
        "donor_revision": donor.revision,
        "tokens": matches.counts(),
        "special_tokens": matches.special,
        **facts,
    }


METHODS: dict[str, Callable[[_Request], Built]] = {
    "scratch": _scratch,
    "project": _project,
    "prune": _prune,
    "transplant": _transplant,
}


def _random_draft(request: _Request, config: PretrainedConfig) -> PreTrainedModel:
    import torch
    from transformers import AutoModelForCausalLM, set_seed

    set_seed(request.seed)
    config = copy.deepcopy(config)
    config.dtype = torch.float32  # some families make buffers in the config's dtype
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def _load(model: Path | PreTrainedModel) -> PreTrainedModel:
    """Return the model of a folder in float32 without dropout; a loaded model as it is."""
    if not isinstance(model, Path):
        return model
    import torch
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.float32, use_safetensors=True, trust_remote_code=False
    )
    return loaded.eval()


def _folder_of(model: Path | PreTrainedModel) -> Path | str:
    return model if isinstance(model, Path) else model.name_or_path


def _cut(request: _Request, model: PreTrainedModel, tokenizer: Path | PreTrainedModel) -> Built:
    """Return the draft cut from ``model``, whose tokenizer is that of ``tokenizer``, and facts."""
    from fastdraft_hf.target.resolve import load_tokenizer

    source, kept = model.config.get_text_config(), request.config.num_hidden_layers
    facts: dict[str, Any] = {}
    chosen = request.design.layers
    if isinstance(chosen, list):
        layers = chosen
    elif chosen == "importance":
        influence = block_influence(model, load_tokenizer(_folder_of(tokenizer), "design.layers"))
        layers = most_important(influence, kept)
        facts["block_influence"] = [round(i, 4) for i in influence]
    else:
        layers = kept_layers_of(source, kept, first=chosen == "first")
    draft = _random_draft(request, with_layers(copy.deepcopy(request.config), source, layers))
    hidden = cut_vocabulary(model, draft)
    cut_layers(model, draft, hidden, layers)
    if hidden.basis is not None:
        facts["explained_variance"] = round(hidden.basis.share, 4)
    facts["layers_of_the_target"] = layers
    return draft, facts


def resize_rows(model: PreTrainedModel, rows: int) -> None:
    """Give embeddings and head ``rows`` rows; new rows are the mean of the others."""
    import torch

    had = model.get_input_embeddings().weight.shape[0]
    if had == rows:
        return
    model.resize_token_embeddings(rows, mean_resizing=False)
    if rows > had:
        with torch.no_grad():
            for module in (model.get_input_embeddings(), model.get_output_embeddings()):
                module.weight[had:] = module.weight[:had].mean(0)


def replace_vocabulary(model: PreTrainedModel, matches: TokenMatches, rows: int) -> None:
    """Give ``model`` the vocabulary that ``matches`` describes, in ``rows`` rows.

    Tokens without pieces, and rows without a token, get the mean of the donor's rows.
    """
    import torch

    with torch.no_grad():
        tables = [model.get_input_embeddings().weight, model.get_output_embeddings().weight]
        if tables[0] is tables[1]:
            tables = tables[:1]
        new = [_mapped(table.float(), matches, rows) for table in tables]
    resize_rows(model, rows)
    with torch.no_grad():
        model.get_input_embeddings().weight.copy_(new[0])
        if len(new) == 2:
            model.get_output_embeddings().weight.copy_(new[1])


def _mapped(table: torch.Tensor, matches: TokenMatches, rows: int) -> torch.Tensor:
    """Return [rows, D]: for each token of the target the mean of its pieces' rows of [V, D]."""
    import torch

    new = table.mean(0).repeat(rows, 1)
    # A tokenizer may name tokens beyond the model's rows (Gemma's `<image_soft_token>`).
    known = [(i, p) for i, found in matches.pieces.items() for p in found if p < len(table)]
    owners = [i for i, _ in known if i < rows]
    pieces = [p for i, p in known if i < rows]
    if pieces:
        owner, sums = torch.tensor(owners), torch.zeros_like(new)
        sums.index_add_(0, owner, table[torch.tensor(pieces)])
        count = torch.bincount(owner, minlength=rows)[:, None]
        new = torch.where(count > 0, sums / count.clamp_min(1), new)
    return new
