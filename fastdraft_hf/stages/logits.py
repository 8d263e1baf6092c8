"""Stage logits: the target's top-k distribution over the text it wrote."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from fastdraft_hf._errors import FastDraftError
from fastdraft_hf._extras import openvino_available
from fastdraft_hf._progress import Progress
from fastdraft_hf.data.config import LogitsConfig
from fastdraft_hf.data.filters import read_kept_rows
from fastdraft_hf.data.target_logits import (
    LogitsReader,
    ModelReader,
    stored_bytes,
    write_target_logits,
)
from fastdraft_hf.export.openvino import cached_openvino
from fastdraft_hf.recipe import logits_sets, resolve_device
from fastdraft_hf.stages.runner import Run

logger = logging.getLogger(__name__)


def run(run: Run, folder: Path) -> dict[str, Any]:
    """Store one folder of shards for every set."""
    config = run.recipe.logits
    assert config is not None  # the stage is planned only with its section
    reader, how = _open_reader(run.target.path, config, resolve_device(run.recipe.device))
    if config.top_k > reader.vocab_size:
        raise FastDraftError(f"logits.top_k: {config.top_k} of a vocabulary of {reader.vocab_size}")
    generated = run.stage_folder("generate")
    sets = {name: read_kept_rows(generated / name)[0] for name in logits_sets(run.recipe)}
    tokens = {name: sum(len(r["completion_ids"]) for r in rows) for name, rows in sets.items()}
    size = stored_bytes(sum(tokens.values()), config.top_k, reader.vocab_size)
    logger.info(
        "logits: %s tokens, top %d of %s: %.1f MB; the time left is shown as it goes",
        f"{sum(tokens.values()):,}",
        config.top_k,
        f"{reader.vocab_size:,}",
        size / 1e6,
    )
    with Progress("logits", sum(tokens.values()), "tokens") as progress:
        for name, rows in sets.items():
            write_target_logits(
                reader,
                rows,
                folder / name,
                top_k=config.top_k,
                temperature=config.temperature,
                batch_tokens=config.batch_tokens,
                rows_per_shard=config.rows_per_shard,
                on_progress=progress.advance,
            )
    return {"tokens": tokens, "bytes": size, **how}


def may_read_openvino(config: LogitsConfig, device: str) -> bool:
    """Return whether OpenVINO reads, if it can read this target."""
    automatic = config.engine == "auto" and device == "cpu" and openvino_available()
    return automatic or config.engine == "openvino"


def _open_reader(
    target: Path, config: LogitsConfig, device: str
) -> tuple[LogitsReader, dict[str, str]]:
    """Load the target, and say what reads it and in which type.

    Raises:
        FastDraftError: OpenVINO is asked for and is not installed, or cannot read this target.
    """
    if config.engine == "openvino" and not openvino_available():
        raise FastDraftError(
            "logits.engine: openvino is not installed; `pip install fastdraft_hf[openvino]`"
        )
    wanted = config.engine == "openvino"
    if may_read_openvino(config, device):
        try:
            return _openvino_reader(target), {"engine": "openvino", "dtype": "float16"}
        except (FastDraftError, NotImplementedError) as error:
            if wanted:
                raise FastDraftError(
                    f"logits.engine: not openvino for this target: {error}"
                ) from error
            logger.warning("logits: transformers reads, as OpenVINO cannot: %s", error)
    import torch
    from transformers import AutoModelForCausalLM

    from fastdraft_hf.train.arguments import has_fast_bf16

    dtype = torch.bfloat16 if has_fast_bf16(device) else torch.float32
    model = AutoModelForCausalLM.from_pretrained(target, dtype=dtype).to(device).eval()
    how = {"engine": "transformers", "dtype": str(dtype).removeprefix("torch.")}
    return ModelReader(model), how


def _openvino_reader(target: Path) -> LogitsReader:
    from fastdraft_hf.decode.openvino.reader import OpenVINOReader

    # Half precision is as exact as bfloat16 in PyTorch; int8, in which the target may have written,
    # moves its distribution twice as far.
    logger.info("exporting the target to OpenVINO fp16 (once)")
    return OpenVINOReader(cached_openvino(target, "fp16"))
