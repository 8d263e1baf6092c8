"""The initializations of a draft: random, or with what another model knows.

A draft is mostly vocabulary, so what its embeddings know at the start decides how far a small token
budget goes.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastdraft_hf.draft.basis import project_vocabulary, tied, vocabulary_basis
from fastdraft_hf.draft.config import DesignConfig
from fastdraft_hf.draft.cutting import block_influence, cut_layers, cut_vocabulary, kept_layers
from fastdraft_hf.draft.design import with_layers
from fastdraft_hf.draft.token_spelling import match_tokens
from fastdraft_hf.draft.vocabulary import check_vocabulary
from fastdraft_hf.target.resolve import load_tokenizer, resolve_target

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel


def init(
    target: Path | PreTrainedModel, config: PretrainedConfig, design: DesignConfig, seed: int
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Build a draft in float32 with its initialization.

    ``scratch`` leaves every weight random, as in the paper (arXiv 2411.11055). ``project`` projects
    the target's embeddings and head. ``prune`` cuts layers of the target, or of a donor with its
    vocabulary, to the draft's widths. ``transplant`` does so with a donor of another tokenizer,
    where a token's embedding is the mean over the pieces that the donor splits its text into.

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
    facts: dict[str, Any] = {"init": design.init}
    if design.takes_layers:
        source = _layer_source(target, config, design, facts)
        draft = _cut(source, target, config, design, seed, facts)
    else:
        draft = _random_draft(config, seed)
        if design.init == "project":
            source = _load(target)
            basis = vocabulary_basis(source, config.hidden_size)
            project_vocabulary(source, draft, basis)
            facts["explained_variance"] = round(basis.share, 4)
    draft.config.dtype = "float32"
    return draft, facts


def _layer_source(
    target: Path | PreTrainedModel,
    config: PretrainedConfig,
    design: DesignConfig,
    facts: dict[str, Any],
) -> PreTrainedModel:
    """Return the model whose layers are cut, with the target's vocabulary; add to the facts."""
    if design.donor is None:
        return _load(target)
    donor = resolve_target(design.donor, key="design.donor")
    facts |= {"donor": donor.name, "donor_revision": donor.revision}
    folder = target if isinstance(target, Path) else Path(target.name_or_path)
    if design.init == "prune":
        check_vocabulary(folder, donor.path, "design.donor", donor=True, resize=design.resize)
        model = _load(donor.path)
        resize_rows(model, config.vocab_size)
        return model
    matches = match_tokens(
        load_tokenizer(folder, "target"), load_tokenizer(donor.path, "design.donor")
    )
    facts |= {"tokens": matches.counts, "special_tokens": matches.special}
    model = _load(donor.path)
    _replace_vocabulary(model, matches.pieces, config.vocab_size)
    return model


def _cut(
    source: PreTrainedModel,
    target: Path | PreTrainedModel,
    config: PretrainedConfig,
    design: DesignConfig,
    seed: int,
    facts: dict[str, Any],
) -> PreTrainedModel:
    """Return the draft cut from ``source``; add to the facts."""
    kept = config.num_hidden_layers
    if isinstance(design.layers, list):
        layers = design.layers
    elif design.layers == "importance":
        folder = target if isinstance(target, Path) else target.name_or_path
        influence = block_influence(source, load_tokenizer(folder, "design.layers"))
        layers = sorted(sorted(range(len(influence)), key=lambda i: -influence[i])[:kept])
        facts["block_influence"] = [round(i, 4) for i in influence]
    else:
        layers = kept_layers(source.config.get_text_config(), kept, first=design.layers == "first")
    shape = with_layers(copy.deepcopy(config), source.config.get_text_config(), layers)
    draft = _random_draft(shape, seed)
    hidden = cut_vocabulary(source, draft)
    cut_layers(source, draft, hidden, layers)
    if hidden.basis is not None:
        facts["explained_variance"] = round(hidden.basis.share, 4)
    facts["layers_of_the_target"] = layers
    return draft


def _random_draft(config: PretrainedConfig, seed: int) -> PreTrainedModel:
    import torch
    from transformers import AutoModelForCausalLM, set_seed

    set_seed(seed)
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


def _replace_vocabulary(
    model: PreTrainedModel, pieces: Mapping[int, Sequence[int]], rows: int
) -> None:
    """Make each token's row the mean of its pieces' rows, in embeddings and head.

    Tokens without pieces, and rows without a token, get the mean of all.
    """
    import torch

    with torch.no_grad():
        tables = [model.get_input_embeddings().weight]
        if not tied(model):
            tables.append(model.get_output_embeddings().weight)
        new = [_mapped(table.float(), pieces, rows) for table in tables]
        resize_rows(model, rows)
        model.get_input_embeddings().weight.copy_(new[0])
        model.get_output_embeddings().weight.copy_(new[-1])


def _mapped(table: torch.Tensor, pieces: Mapping[int, Sequence[int]], rows: int) -> torch.Tensor:
    """Return [rows, D] from [V, D]."""
    new = table.mean(0).repeat(rows, 1)
    for index, found in pieces.items():
        # A tokenizer may name tokens beyond the model's rows (Gemma's `<image_soft_token>`).
        known = [piece for piece in found if piece < len(table)]
        if known and index < rows:
            new[index] = table[known].mean(0)
    return new
