"""Opens the engine through which the target writes, as the recipe asks for it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from fastdraft_hf._errors import FastDraftError
from fastdraft_hf.data.engines import Engine, choose_engine, open_engine
from fastdraft_hf.export.openvino import cached_openvino
from fastdraft_hf.pipeline.recipe import resolve_device
from fastdraft_hf.pipeline.run import Run

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


def stop_ids(path: Path, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Return every id that ends a text of this target: its EOS tokens and the document's end."""
    from transformers import GenerationConfig

    config = GenerationConfig.from_pretrained(path)
    eos = config.eos_token_id if config.eos_token_id is not None else tokenizer.eos_token_id
    ids = set(eos) if isinstance(eos, list) else {eos}
    vocabulary = tokenizer.get_vocab()
    if "<|endoftext|>" in vocabulary:
        ids.add(vocabulary["<|endoftext|>"])
    if None in ids or not ids:
        raise FastDraftError("target: neither its generation config nor its tokenizer has an EOS")
    return ids


def open_target_engine(run: Run, tokenizer: PreTrainedTokenizerBase) -> Engine:
    """Load the run's target into the engine of ``generate.engine``."""
    config = run.recipe.generate
    assert config is not None  # the stage is planned only with its section
    path = run.target.path
    device = resolve_device(run.recipe.device)
    name = choose_engine(config.engine, device)
    openvino_target = None
    if name == "openvino":
        logger.info("exporting the target to OpenVINO %s (once)", config.openvino_weight_format)
        openvino_target = cached_openvino(path, config.openvino_weight_format)
    return open_engine(
        name,
        target=path,
        openvino_target=openvino_target,
        stop_ids=stop_ids(path, tokenizer),
        batch_size=config.batch_size,
        device=device,
    )
