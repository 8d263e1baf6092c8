"""Stage logits: the target's top-k distribution over the text it wrote."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from fastdraft_hf._errors import FastDraftError
from fastdraft_hf._head import head_of
from fastdraft_hf._progress import Progress
from fastdraft_hf.data.filters import read_kept_rows
from fastdraft_hf.data.target_logits import stored_bytes, write_target_logits
from fastdraft_hf.pipeline.recipe import logits_sets, resolve_device
from fastdraft_hf.pipeline.run import Run

logger = logging.getLogger(__name__)


def run(run: Run, folder: Path) -> dict[str, Any]:
    """Store one folder of shards for every set."""
    import torch
    from transformers import AutoModelForCausalLM

    from fastdraft_hf.training.arguments import has_fast_bf16

    config = run.recipe.logits
    assert config is not None  # the stage is planned only with its section
    device = resolve_device(run.recipe.device)
    dtype = torch.bfloat16 if has_fast_bf16(device) else torch.float32
    model = AutoModelForCausalLM.from_pretrained(run.target.path, dtype=dtype).to(device).eval()
    vocab_size = int(head_of(model).weight.shape[0])
    if config.top_k > vocab_size:
        raise FastDraftError(f"logits.top_k: {config.top_k} of a vocabulary of {vocab_size}")
    generated = run.stage_folder("generate")
    sets = {name: read_kept_rows(generated / name)[0] for name in logits_sets(run.recipe)}
    tokens = {name: sum(len(r["completion_ids"]) for r in rows) for name, rows in sets.items()}
    size = stored_bytes(sum(tokens.values()), config.top_k, vocab_size)
    logger.info(
        "logits: %s tokens, top %d of %s: %.1f MB; the time left is shown as it goes",
        f"{sum(tokens.values()):,}",
        config.top_k,
        f"{vocab_size:,}",
        size / 1e6,
    )
    with Progress("logits", sum(tokens.values()), "tokens") as progress:
        for name, rows in sets.items():
            write_target_logits(
                model,
                rows,
                folder / name,
                top_k=config.top_k,
                temperature=config.temperature,
                batch_tokens=config.batch_tokens,
                rows_per_shard=config.rows_per_shard,
                on_progress=progress.advance,
            )
    return {"tokens": tokens, "bytes": size, "dtype": str(dtype).removeprefix("torch.")}
