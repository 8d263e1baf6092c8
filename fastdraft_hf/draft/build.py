"""Build a draft for a target: its config, its initialization, and the target's tokenizer.

A draft is mostly vocabulary, so what its embeddings know at the start decides how far a small token
budget goes.
"""

import contextlib
import copy
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    set_seed,
)

from fastdraft_hf._errors import FastDraftError
from fastdraft_hf.draft.config import DesignConfig
from fastdraft_hf.draft.cutting import (
    cut_layers,
    cut_vocabulary,
    kept_layers,
    project_vocabulary,
    tied,
    vocabulary_basis,
)
from fastdraft_hf.draft.design import TOLERANCE, design_draft, resolve_design, with_layers
from fastdraft_hf.draft.families import (
    count_parameters,
    dense_config,
    head_size,
    read_parameters,
    text_config,
)
from fastdraft_hf.draft.vocabulary import Vocabulary, check_vocabulary, match_tokens
from fastdraft_hf.target.resolve import check_model, load_config, load_tokenizer, resolve_target

logger = logging.getLogger(__name__)


def build_draft(
    target: str | Path | PreTrainedModel,
    params: int | str | None = None,
    *,
    seed: int = 0,
    **design: Any,
) -> PreTrainedModel:
    """Return a draft for ``target`` with its initialization done, ready to be trained.

    It is an ordinary causal language model of the target's family in float32, with the target's
    vocabulary and end tokens. Its attribute ``tokenizer`` is the target's, and `save_draft` writes
    both.

    Args:
        target: a model id on the Hub, a folder, ``embedded:NAME``, or a loaded model.
        params: parameter budget, such as ``"50M"`` or 50_000_000. By default a share of what the
            target reads per token (`fastdraft_hf.draft.design.default_budget`).
        seed: of the random weights.
        **design: other settings of a recipe's section ``design``, such as ``init="project"`` or
            ``num_hidden_layers=3``.

    Raises:
        FastDraftError: a setting is wrong, the target or donor cannot be used, or the budget cannot
            hold the vocabulary.

    Example:
        ```python
        draft = build_draft("Qwen/Qwen3-0.6B", params="50M")
        trainer = DraftDistillationTrainer(model=draft, train_dataset=dataset)
        ```
    """
    section = DesignConfig(params=params, draft=None, **design)
    source = resolve_target(str(target)).path if isinstance(target, (str, Path)) else target
    return build(source, section, seed)[0]


def build(
    target: Path | PreTrainedModel, design: DesignConfig, seed: int
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Return the draft that a section describes, as `build_draft` does, and facts about it."""
    tokenizer = stored = None
    if isinstance(target, Path):
        target_config, tokenizer = load_config(target, "target"), load_tokenizer(target, "target")
        if (target / "generation_config.json").is_file():
            stored = GenerationConfig.from_pretrained(target)
    else:
        target_config, stored = target.config, target.generation_config
        if target.name_or_path:
            with contextlib.suppress(FastDraftError):
                tokenizer = load_tokenizer(target.name_or_path)
    design = resolve_design(target_config, design)
    config = design_draft(target_config, design)
    size, target_size = count_parameters(config), count_parameters(target_config)
    read = read_parameters(config)
    target_read = read_parameters(dense_config(text_config(target_config)))
    logger.info(
        f"draft: {config.model_type}, {config.num_hidden_layers} layers of width "
        f"{config.hidden_size}, feed-forward {config.intermediate_size}, "
        f"{config.num_attention_heads} heads of {head_size(config)}; {size:,} parameters, "
        f"1/{target_size / size:.1f} of the target's (the paper's c is {size / target_size:.4f}); "
        f"a token reads {read:,} of them, 1/{target_read / read:.1f} of what the target reads"
    )
    if design.params and design.hidden_size is None and size < (1 - TOLERANCE) * design.params:
        logger.warning(
            f"design.params: {size:,} of the {design.params:,} parameters asked for are used; the "
            "next wider draft would have more"
        )
    draft, facts = initialize(target, config, design, seed)
    # A config often has only the end of a text; the end of a turn is in the generation config.
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if getattr(stored, name, None) is not None:
            setattr(draft.generation_config, name, getattr(stored, name))
    draft.tokenizer = tokenizer
    sizes = ("hidden_size", "num_hidden_layers", "intermediate_size")
    return draft, {
        "draft_parameters": size,
        "target_parameters": target_size,
        "draft_parameters_read": read,
        "target_parameters_read": target_read,
        **{name: getattr(config, name) for name in sizes},
        **facts,
    }


def initialize(
    target: Path | PreTrainedModel, config: PretrainedConfig, design: DesignConfig, seed: int
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Return a draft of ``config`` in float32 with its initialization, and facts about it.

    ``scratch`` leaves every weight random, as in the paper (arXiv 2411.11055), and does not read
    the target. ``project`` projects the target's embeddings and head. ``prune`` cuts layers of the
    target, or of a donor with its vocabulary, to the draft's widths. ``transplant`` does so with a
    donor of another tokenizer, where a token's embedding is the mean over the pieces that the donor
    splits its text into.
    """
    facts: dict[str, Any] = {"init": design.init}
    if design.takes_layers:
        draft, cut = _cut_draft(target, config, design, seed)
        facts |= cut
    else:
        draft = _random_draft(config, seed)
        if design.init == "project":
            source = _load(target)
            hidden = vocabulary_basis(source, config.hidden_size)
            project_vocabulary(source, draft, hidden)
            facts["explained_variance"] = round(hidden.share, 4)
    draft.config.dtype = "float32"
    return draft, facts


def _cut_draft(
    target: Path | PreTrainedModel, config: PretrainedConfig, design: DesignConfig, seed: int
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Return a draft with layers of the target or a donor, and facts."""
    folder = target if isinstance(target, Path) else Path(target.name_or_path)
    facts: dict[str, Any] = {}
    if design.donor is None:
        source = _load(target)
    else:
        donor = resolve_target(design.donor, key="design.donor")
        facts |= {"donor": donor.name, "donor_revision": donor.revision}
        if design.init != "transplant":
            check_vocabulary(folder, donor.path, "design.donor", donor=True, resize=design.resize)
            source = _load(donor.path)
            resize_rows(source, config.vocab_size)
        else:
            theirs = load_tokenizer(donor.path, "design.donor")
            pieces, facts["tokens"] = match_tokens(load_tokenizer(folder, "target"), theirs)
            source = _load(donor.path)
            _replace_vocabulary(source, pieces, config.vocab_size)
    shape, kept = source.config.get_text_config(), config.num_hidden_layers
    if isinstance(design.layers, list):
        layers = design.layers
    else:
        layers = kept_layers(shape, kept, first=design.layers == "first")
    draft = _random_draft(with_layers(copy.deepcopy(config), shape, layers), seed)
    hidden = cut_vocabulary(source, draft)
    cut_layers(source, draft, hidden, layers)
    if hidden.directions is not None:
        facts["explained_variance"] = round(hidden.share, 4)
    return draft, {**facts, "layers_of_the_target": layers}


def _random_draft(config: PretrainedConfig, seed: int) -> PreTrainedModel:
    set_seed(seed)
    config = copy.deepcopy(config)
    config.dtype = torch.float32  # some families make buffers in the config's dtype
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def _load(model: Path | PreTrainedModel) -> PreTrainedModel:
    """Return the model of a folder in float32 without dropout; a loaded model as it is."""
    if not isinstance(model, Path):
        return model
    kwargs = {"dtype": torch.float32, "use_safetensors": True, "trust_remote_code": False}
    return AutoModelForCausalLM.from_pretrained(model, **kwargs).eval()


def resize_rows(model: PreTrainedModel, rows: int) -> None:
    """Give embeddings and head ``rows`` rows; new rows are the mean of the others."""
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
    """Make each token's row the mean of its pieces' rows; rows without pieces, the mean of all."""

    def mapped(table: torch.Tensor) -> torch.Tensor:
        new = table.mean(0).repeat(rows, 1)
        for index, found in pieces.items():
            # A tokenizer may name tokens beyond the model's rows (Gemma's `<image_soft_token>`).
            known = [piece for piece in found if piece < len(table)]
            if known and index < rows:
                new[index] = table[known].mean(0)
        return new

    with torch.no_grad():
        embeddings = mapped(model.get_input_embeddings().weight.float())
        head = None if tied(model) else mapped(model.get_output_embeddings().weight.float())
        resize_rows(model, rows)
        model.get_input_embeddings().weight.copy_(embeddings)
        if head is not None:
            model.get_output_embeddings().weight.copy_(head)


def save_draft(draft: PreTrainedModel, folder: str | Path) -> None:
    """Write a draft and its attribute ``tokenizer`` to a folder that ``from_pretrained`` reads.

    Raises:
        FastDraftError: the draft has no tokenizer.
    """
    tokenizer = getattr(draft, "tokenizer", None)
    if tokenizer is None:
        raise FastDraftError(
            "save_draft: the draft has no tokenizer; set draft.tokenizer to the target's"
        )
    draft.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def adopt(target: Path, source: Path, *, resize: bool) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Load a draft whose vocabulary is the target's, as `build` returns a new one.

    With ``resize`` it gets the target's rows, tokenizer and special tokens.

    Raises:
        FastDraftError: it is not a draft, or its vocabulary is another one.
    """
    if not (source / "config.json").is_file():
        raise FastDraftError(f"design.draft: {source} holds no config.json, so it is not a draft")
    check_model(source, "design.draft")
    target_tokenizer = load_tokenizer(target, "target")
    vocabulary = Vocabulary.of_folder(target, "the target", target_tokenizer)
    report = check_vocabulary(vocabulary, source, "design.draft", resize=resize)
    kwargs = {"use_safetensors": True, "trust_remote_code": False}
    draft: PreTrainedModel = AutoModelForCausalLM.from_pretrained(source, **kwargs)
    draft.tokenizer = target_tokenizer if resize else load_tokenizer(source, "design.draft")
    if resize and vocabulary.rows is not None:
        resize_rows(draft, vocabulary.rows)
        for role in ("bos", "eos", "pad"):
            index = getattr(target_tokenizer, f"{role}_token_id")
            for config in (draft.config, draft.generation_config):
                setattr(config, f"{role}_token_id", index)
    size = draft.num_parameters()
    return draft, {"draft_parameters": size, "init": str(source), "vocabulary": report.verdict}
