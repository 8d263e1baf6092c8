"""Open the engine through which the target generates, as the recipe asks for it."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from fastdraft_hf._processes import on_main
from fastdraft_hf.data.engines import Engine, choose_engine
from fastdraft_hf.export.openvino import WeightFormat, cached_openvino
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
    if name != "server":
        weights = config.openvino_weight_format
        return load_engine(name, path, ends, config.batch_size, process_device(device), weights)
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


def load_engine(
    name: Literal["openvino", "transformers"],
    target: Path,
    stop_ids: set[int],
    batch_size: int,
    device: str = "cpu",
    weight_format: WeightFormat = "int8",
) -> Engine:
    """Load the target into an engine of this process.

    Args:
        name: of the engine.
        target: the target's Hugging Face folder.
        stop_ids: token ids that end a completion.
        batch_size: completions generated at once.
        device: ``cpu``, ``cuda`` or ``cuda:N``. OpenVINO runs on the CPU.
        weight_format: of OpenVINO's export.
    """
    if name == "openvino":
        from fastdraft_hf.data.engines.openvino import OpenVINOEngine

        logger.info("exporting the target to OpenVINO %s (once)", weight_format)
        export = on_main(lambda: cached_openvino(target, weight_format))
        return OpenVINOEngine(export, stop_ids, batch_size)
    from fastdraft_hf.data.engines.transformers import TransformersEngine

    return TransformersEngine(target, stop_ids, batch_size, device)
