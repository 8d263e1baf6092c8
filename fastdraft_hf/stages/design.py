"""Stage design: the draft's config and initialization, with the target's tokenizer."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastdraft_hf._errors import FastDraftError
from fastdraft_hf.stages.runner import Run

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

logger = logging.getLogger(__name__)


def run(run: Run, folder: Path) -> dict[str, Any]:
    """Write an untrained draft that ``from_pretrained`` loads.

    For a target's folder without any weights, only the config (and tokenizer): a plan.
    """
    from transformers import AutoConfig, AutoTokenizer

    from fastdraft_hf.draft.design import TOLERANCE, count_parameters, design_draft
    from fastdraft_hf.draft.init import init

    design = run.recipe.design
    if design.draft is not None:
        return _adopt(run, Path(design.draft), folder)
    planning = without_weights(Path(run.recipe.target).expanduser())
    path = (run.look_at_target() if planning else run.target).path
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
    if design.hidden_size is None and draft_parameters < (1 - TOLERANCE) * design.params:
        logger.warning(
            "design.params: %s is more than a draft of this depth and these initialization can "
            "use; it has %s",
            f"{design.params:,}",
            f"{draft_parameters:,}",
        )
    facts: dict[str, Any] = {}
    if planning:
        logger.warning("%s holds no weights: only the draft's config is written", path)
        _save_config(config, folder)
        facts = {"init": None}
    else:
        draft, facts = init(path, config, design, run.recipe.seed)
        _end_alike(draft, path)
        draft.save_pretrained(folder)
        config = draft.config
    if not planning or any(path.glob("tokenizer*")):
        AutoTokenizer.from_pretrained(path).save_pretrained(folder)
    return {
        "draft_parameters": draft_parameters,
        "target_parameters": target_parameters,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "intermediate_size": config.intermediate_size,
        **facts,
    }


def without_weights(folder: Path) -> bool:
    """Return whether a folder holds a config and no weights of any kind."""
    suffixes = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack")
    return (folder / "config.json").is_file() and not any(
        file.name.endswith(suffixes) for file in folder.iterdir()
    )


def planned_config(run: Run) -> tuple[PretrainedConfig, PretrainedConfig]:
    """Return the target's config and the draft's; nothing is written, no weights are read."""
    from transformers import AutoConfig

    from fastdraft_hf.draft.design import design_draft

    target = AutoConfig.from_pretrained(run.look_at_target().path)
    given = run.recipe.design.draft
    if given is None:
        return target, design_draft(target, run.recipe.design)
    if not (Path(given) / "config.json").is_file():
        raise FastDraftError(f"design.draft: {given} holds no config.json, so it is no draft")
    return target, AutoConfig.from_pretrained(given)


def _end_alike(draft: PreTrainedModel, target: Path) -> None:
    """Give the draft the special tokens of the target's generation config, which ends turns.

    A config often has only the end of a text, and the end of a turn stands there.
    """
    from transformers import GenerationConfig

    if not (target / "generation_config.json").is_file():
        return
    stored = GenerationConfig.from_pretrained(target)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if getattr(stored, name) is not None:
            setattr(draft.generation_config, name, getattr(stored, name))


def _save_config(config: PretrainedConfig, folder: Path) -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    # A model writes its class into its config; without one it is looked up.
    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]
    config.architectures = [name if isinstance(name, str) else name[0]]
    config.save_pretrained(folder)


def _adopt(run: Run, source: Path, folder: Path) -> dict[str, Any]:
    """Take an existing draft as it is, after checking that its vocabulary is the target's."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from fastdraft_hf.draft.init.prune import resize_rows
    from fastdraft_hf.draft.reduced_vocabulary import (
        check_token_ids,
        read_reduced_vocabulary,
        write_reduced_vocabulary,
    )
    from fastdraft_hf.draft.vocabulary import Vocabulary, check_vocabulary
    from fastdraft_hf.hub.run_folder import earlier_training

    resize = run.recipe.design.resize
    if not (source / "config.json").is_file():
        raise FastDraftError(f"design.draft: {source} holds no config.json, so it is no draft")
    target_tokenizer = AutoTokenizer.from_pretrained(run.target.path)
    head = read_reduced_vocabulary(source)
    report = check_vocabulary(
        Vocabulary.of_folder(run.target.path, "the target", target_tokenizer),
        source,
        "design.draft",
        resize=resize,
    )
    tokenizer = target_tokenizer if resize else AutoTokenizer.from_pretrained(source)
    draft = AutoModelForCausalLM.from_pretrained(source, use_safetensors=True)
    if resize and report.target.rows is not None:
        resize_rows(draft, report.target.rows)
        # It stops and pads as the target does, whose tokenizer it now has.
        for role in ("bos", "eos", "pad"):
            index = getattr(target_tokenizer, f"{role}_token_id")
            for config in (draft.config, draft.generation_config):
                setattr(config, f"{role}_token_id", index)
    if head is not None:  # it stays reduced, until it is trained
        check_token_ids(head.token_ids, draft.get_input_embeddings().weight.shape[0])
        write_reduced_vocabulary(folder, head)
    draft.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    facts = {
        "draft_parameters": draft.num_parameters(),
        "init": str(source),
        "vocabulary": report.verdict,
    }
    earlier = earlier_training(source)
    return facts if earlier is None else {**facts, "earlier": earlier}
