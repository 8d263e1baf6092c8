"""Opens the engine through which the target writes, as the recipe asks for it."""

from __future__ import annotations

import functools
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING

from fastdraft_hf._errors import FastDraftError
from fastdraft_hf.data.config import GenerateConfig
from fastdraft_hf.data.engines import Drafting, Engine, choose_engine, open_engine
from fastdraft_hf.data.engines.faster import FasterEngine
from fastdraft_hf.draft.vocabulary import Vocabulary, check_vocabulary
from fastdraft_hf.export.openvino import cached_openvino
from fastdraft_hf.recipe import resolve_device
from fastdraft_hf.stages.runner import Run
from fastdraft_hf.target.resolve import stop_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


def open_target_engine(run: Run, tokenizer: PreTrainedTokenizerBase) -> Engine:
    """Load the run's target into the engine of ``generate.engine``.

    Raises:
        FastDraftError: a setting of ``generate`` is wrong, or a server does not answer.
    """
    config = run.recipe.generate
    assert config is not None  # the stage is planned only with its section
    device = resolve_device(run.recipe.device)
    name = choose_engine(config.engine, device, config.servers)
    path = run.target.path
    ends = stop_ids(path, tokenizer)
    if name == "vllm":
        if config.draft is not None:
            raise FastDraftError(
                "generate.draft: a vllm server drafts by settings of its own "
                "(vllm serve --speculative-config)"
            )
        from fastdraft_hf.data.engines.vllm import VLLMEngine

        return VLLMEngine(
            config.servers,
            ends,
            config.batch_size,
            model=config.server_model,
            target=run.target.name,
        )
    draft = None if config.draft is None else _drafting(config, name, path, tokenizer)
    openvino_target = None
    if name == "openvino":
        logger.info("exporting the target to OpenVINO %s (once)", config.openvino_weight_format)
        openvino_target = cached_openvino(path, config.openvino_weight_format)
    open_with = functools.partial(
        open_engine,
        name,
        target=path,
        openvino_target=openvino_target,
        stop_ids=ends,
        batch_size=config.batch_size,
        device=_own_device(device),
    )
    if draft is None:
        return open_with()
    return FasterEngine(open_with, functools.partial(open_with, draft=draft), config.batch_size)


def _own_device(device: str) -> str:
    """Return the GPU of this process, where several share a machine (LOCAL_RANK)."""
    local = os.environ.get("LOCAL_RANK", "")
    return f"cuda:{local}" if device == "cuda" and local.isdecimal() else device


def _drafting(
    config: GenerateConfig, name: str, target: Path, tokenizer: PreTrainedTokenizerBase
) -> Drafting:
    """Check the draft and bring it into the engine's format."""
    assert config.draft is not None
    folder = Path(config.draft).expanduser()
    if not (folder / "config.json").is_file():
        raise FastDraftError(f"generate.draft: {folder} is no folder of a draft")
    check_vocabulary(
        Vocabulary.of_folder(target, "the target", tokenizer), folder, "generate.draft"
    )
    exported = (folder / "openvino_model.xml").exists()
    if name == "openvino":
        if not exported:
            folder = cached_openvino(folder, config.openvino_weight_format)
        return Drafting(folder, config.num_assistant_tokens)
    if exported:
        raise FastDraftError(
            f"generate.draft: {folder} is an OpenVINO export; engine transformers wants the "
            "draft's PyTorch folder"
        )
    from fastdraft_hf.decode.speculative import assisted_decoding

    return Drafting(folder, config.num_assistant_tokens, assisted_decoding)
