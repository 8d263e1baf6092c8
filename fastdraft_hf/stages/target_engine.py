"""Open the engine through which the target generates, as the recipe asks for it."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING

from fastdraft_hf._processes import on_main
from fastdraft_hf.data.engines import Engine, choose_engine, open_engine
from fastdraft_hf.export.openvino import cached_openvino
from fastdraft_hf.recipe import resolve_device
from fastdraft_hf.stages.run import Run
from fastdraft_hf.target.resolve import load_config, stop_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


def process_device(device: str) -> str:
    """Return the GPU of this process (LOCAL_RANK) if the device is ``cuda``."""
    local = os.environ.get("LOCAL_RANK", "")
    return f"cuda:{local}" if device == "cuda" and local.isdecimal() else device


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
    if name == "server":
        from fastdraft_hf.data.engines.server import ServerEngine

        return ServerEngine(
            config.servers,
            ends,
            config.batch_size,
            # The head may score more ids than the tokenizer has.
            vocab_size=load_config(path).get_text_config().vocab_size,
            model=config.server_model,
            target=run.target.name,
        )
    openvino_target = None
    if name == "openvino":
        logger.info("exporting the target to OpenVINO %s (once)", config.openvino_weight_format)
        openvino_target = on_main(lambda: cached_openvino(path, config.openvino_weight_format))
    return open_engine(
        name,
        target=path,
        openvino_target=openvino_target,
        stop_ids=ends,
        batch_size=config.batch_size,
        device=process_device(device),
    )
