"""Stage design: the draft's config and first weights, with the target's tokenizer."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from fastdraft_hf._errors import FastDraftError
from fastdraft_hf.pipeline.run import Run

logger = logging.getLogger(__name__)


def run(run: Run, folder: Path) -> dict[str, Any]:
    """Write an untrained draft that ``from_pretrained`` loads."""
    from transformers import AutoConfig, AutoTokenizer

    from fastdraft_hf.drafts.design import count_parameters, design_draft
    from fastdraft_hf.drafts.first_weights import first_weights

    design = run.recipe.design
    if design.draft is not None:
        return _adopt(run, Path(design.draft), folder)
    path = run.target.path
    target_config = AutoConfig.from_pretrained(path)
    config = design_draft(target_config, design)
    draft_parameters = count_parameters(config)
    target_parameters = count_parameters(target_config)
    logger.info(
        "draft: %s, %d layers of width %d, %s parameters (1/%.1f of the target)",
        config.model_type,
        config.num_hidden_layers,
        config.hidden_size,
        f"{draft_parameters:,}",
        target_parameters / draft_parameters,
    )
    draft, facts = first_weights(path, config, design, run.recipe.seed)
    draft.save_pretrained(folder)
    AutoTokenizer.from_pretrained(path).save_pretrained(folder)
    return {
        "draft_parameters": draft_parameters,
        "target_parameters": target_parameters,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "intermediate_size": config.intermediate_size,
        **facts,
    }


def _adopt(run: Run, source: Path, folder: Path) -> dict[str, Any]:
    """Take an existing draft as it is, after checking that its vocabulary is the target's."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from fastdraft_hf.drafts.vocabulary import check_same_vocabulary

    if not (source / "config.json").is_file():
        raise FastDraftError(f"design.draft: {source} holds no config.json, so it is no draft")
    tokenizer = AutoTokenizer.from_pretrained(source)
    check_same_vocabulary(AutoTokenizer.from_pretrained(run.target.path), tokenizer, source)
    draft = AutoModelForCausalLM.from_pretrained(source, use_safetensors=True)
    draft.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return {"draft_parameters": draft.num_parameters(), "first_weights": str(source)}
