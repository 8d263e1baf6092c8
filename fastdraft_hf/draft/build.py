"""Build a draft for a target: its config, its initialization, and the target's tokenizer."""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fastdraft_hf._errors import FastDraftError
from fastdraft_hf.draft.config import DesignConfig, Initialization
from fastdraft_hf.target.resolve import load_config, load_tokenizer, resolve_target

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)


def build_draft(
    target: str | Path | PreTrainedModel,
    params: int | str = "50M",
    *,
    init: Initialization = "prune",
    num_hidden_layers: int = 2,
    hidden_size: int | None = None,
    intermediate_size: int | None = None,
    donor: str | None = None,
    layers: Literal["even", "first", "importance"] | list[int] = "even",
    resize: bool = False,
    seed: int = 0,
) -> PreTrainedModel:
    """Return a draft for ``target`` with its initialization done, ready to be trained.

    It is an ordinary causal language model of the target's family in float32, with the target's
    vocabulary and end tokens. Its attribute ``tokenizer`` is the target's, and `save_draft` writes
    both.

    Args:
        target: a model id on the Hub, a folder, ``embedded:NAME``, or a loaded model.
        params: parameter budget, such as ``"50M"`` or 50_000_000; met within 2%.
        init: ``prune`` (layers of the target cut to the draft's widths), ``project`` (its
            embeddings and head, random layers), ``transplant`` (a donor with another tokenizer) or
            ``scratch``.
        num_hidden_layers, hidden_size, intermediate_size, donor, layers, resize: as in a recipe's
            section ``design``.
        seed: of the random weights.

    Raises:
        FastDraftError: the target or donor cannot be used, or the budget cannot be met.

    Example:
        ```python
        draft = build_draft("Qwen/Qwen3-0.6B", params="50M")
        trainer = DraftDistillationTrainer(model=draft, train_dataset=dataset)
        ```
    """
    design = DesignConfig(
        params=params,
        init=init,
        num_hidden_layers=num_hidden_layers,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        donor=donor,
        layers=layers,
        resize=resize,
    )
    source = resolve_target(str(target)).path if isinstance(target, (str, Path)) else target
    return build(source, design, seed)[0]


def build(
    target: Path | PreTrainedModel, design: DesignConfig, seed: int
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Build the draft that a section describes, as `build_draft` does.

    Args:
        target: the target's folder, or the loaded target.
        design: the section; its ``draft`` is not used.
        seed: of the random weights.

    Returns:
        the draft, and facts about how it was made.
    """
    from transformers import GenerationConfig

    from fastdraft_hf.draft.design import TOLERANCE, design_draft
    from fastdraft_hf.draft.init import init
    from fastdraft_hf.draft.sizes import count_parameters

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
    config = design_draft(target_config, design)
    size, target_size = count_parameters(config), count_parameters(target_config)
    logger.info(
        "draft: %s, %d layers of width %d, %s parameters (1/%.1f of the target)",
        config.model_type,
        config.num_hidden_layers,
        config.hidden_size,
        f"{size:,}",
        target_size / size,
    )
    if design.hidden_size is None and size < (1 - TOLERANCE) * design.params:
        logger.warning(
            "design.params: a draft of this depth and initialization has at most %s parameters "
            "here, fewer than the %s asked for",
            f"{size:,}",
            f"{design.params:,}",
        )
    draft, facts = init(target, config, design, seed)
    # A config often has only the end of a text; the end of a turn is in the generation config.
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if getattr(stored, name, None) is not None:
            setattr(draft.generation_config, name, getattr(stored, name))
    draft.tokenizer = tokenizer
    sizes = ("hidden_size", "num_hidden_layers", "intermediate_size")
    return draft, {
        "draft_parameters": size,
        "target_parameters": target_size,
        **{name: getattr(config, name) for name in sizes},
        **facts,
    }


def save_draft(draft: PreTrainedModel, folder: str | Path) -> None:
    """Write a draft and its target's tokenizer to ``folder``, which ``from_pretrained`` reads.

    Args:
        draft: a model from `build_draft`, or any model with a ``tokenizer``.
        folder: where to write.

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
    """Load an existing draft whose vocabulary is the target's, as `build` returns a new one.

    Args:
        target: the target's folder.
        source: the draft's folder.
        resize: whether it gets the target's rows, tokenizer and special tokens.

    Raises:
        FastDraftError: it is not a draft, or its vocabulary is another one.
    """
    from transformers import AutoModelForCausalLM

    from fastdraft_hf.draft.init import resize_rows
    from fastdraft_hf.draft.vocabulary import Vocabulary, check_vocabulary

    if not (source / "config.json").is_file():
        raise FastDraftError(f"design.draft: {source} holds no config.json, so it is not a draft")
    target_tokenizer = load_tokenizer(target, "target")
    report = check_vocabulary(
        Vocabulary.of_folder(target, "the target", target_tokenizer),
        source,
        "design.draft",
        resize=resize,
    )
    draft: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        source, use_safetensors=True, trust_remote_code=False
    )
    draft.tokenizer = target_tokenizer if resize else load_tokenizer(source, "design.draft")
    if resize and report.target.rows is not None:
        resize_rows(draft, report.target.rows)
        for role in ("bos", "eos", "pad"):
            index = getattr(target_tokenizer, f"{role}_token_id")
            for config in (draft.config, draft.generation_config):
                setattr(config, f"{role}_token_id", index)
    return draft, {
        "draft_parameters": draft.num_parameters(),
        "init": str(source),
        "vocabulary": report.verdict,
    }
