"""Stage bench: wall clock with and without the draft, over γ, through each path."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastdraft_hf._atomic import write_json
from fastdraft_hf._errors import FastDraftError
from fastdraft_hf._extras import openvino_available
from fastdraft_hf.decoding.records import DecodingRecord
from fastdraft_hf.evaluation import bench
from fastdraft_hf.evaluation.journal import Journal
from fastdraft_hf.evaluation.prompts import EvaluationPrompt, draw_prompts
from fastdraft_hf.export.openvino import cached_openvino
from fastdraft_hf.pipeline.recipe import resolve_device
from fastdraft_hf.pipeline.run import Run

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


def run(run: Run, folder: Path) -> dict[str, Any]:
    """Write ``records.jsonl`` and ``results.json``."""
    from transformers import AutoTokenizer

    config = run.recipe.bench
    tokenizer = AutoTokenizer.from_pretrained(run.target.path)
    prompts = draw_prompts(
        tokenizer,
        config.tasks,
        config.prompts_per_task,
        config.max_prompt_tokens,
        run.recipe.seed,
    )
    journal = Journal(folder / "records.jsonl")
    results: dict[str, Any] = {"max_new_tokens": config.max_new_tokens, "paths": {}}
    makers = {"transformers": _transformers, "openvino": _openvino}
    for path in config.paths:
        if path == "openvino" and not openvino_available():
            logger.warning("bench: OpenVINO is not installed, so that path is left out")
            continue
        decode = makers[path](run, tokenizer)
        bench.collect(path, decode, prompts, config, journal)
        results["paths"][path] = bench.summarize(path, prompts, config, journal)
    write_json(folder / "results.json", results)
    return {
        path: {
            "best_num_assistant_tokens": found["overall"]["best_num_assistant_tokens"],
            "is_speed_up": found["overall"]["is_speed_up"],
        }
        for path, found in results["paths"].items()
    }


def _transformers(run: Run, tokenizer: PreTrainedTokenizerBase) -> bench.Decode:
    import torch
    from transformers import AutoModelForCausalLM

    from fastdraft_hf.decoding.assisted import decode

    device = resolve_device(run.recipe.device)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32

    def load(path: Path) -> Any:
        return AutoModelForCausalLM.from_pretrained(path, dtype=dtype).to(device).eval()

    target, draft = load(run.target.path), load(run.latest_model())

    def one(prompt: EvaluationPrompt, gamma: int) -> DecodingRecord:
        return decode(
            target,
            prompt.ids,
            task=prompt.task,
            key=prompt.key,
            max_new_tokens=run.recipe.bench.max_new_tokens,
            temperature=0.0,
            seed=run.recipe.seed,
            draft=draft if gamma else None,
            num_assistant_tokens=gamma,
        )

    return one


def _openvino(run: Run, tokenizer: PreTrainedTokenizerBase) -> bench.Decode:
    from fastdraft_hf.decoding.openvino import OpenVINODecoder
    from fastdraft_hf.pipeline.stages.generate import stop_ids

    config = run.recipe.bench
    draft = run.stage_folder("export") / f"openvino-{config.weight_format}"
    if not draft.exists():
        raise FastDraftError(
            f"bench.weight_format: {config.weight_format} was not exported; add it to "
            "export.openvino"
        )
    target = cached_openvino(run.target.path, config.weight_format)
    ids = stop_ids(run.target.path, tokenizer)
    decoders = {False: OpenVINODecoder(target), True: OpenVINODecoder(target, draft)}

    def one(prompt: EvaluationPrompt, gamma: int) -> DecodingRecord:
        return decoders[gamma > 0].decode(
            prompt.ids,
            task=prompt.task,
            key=prompt.key,
            max_new_tokens=config.max_new_tokens,
            temperature=0.0,
            seed=run.recipe.seed,
            stop_ids=ids,
            num_assistant_tokens=gamma,
        )

    return one
