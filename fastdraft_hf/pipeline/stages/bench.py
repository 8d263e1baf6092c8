"""Stage bench: wall clock with and without the draft, over γ, through each path."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastdraft_hf._atomic import write_json
from fastdraft_hf._errors import FastDraftError
from fastdraft_hf._extras import openvino_available
from fastdraft_hf.decoding.records import DecodingRecord
from fastdraft_hf.decoding.settings import store_draft_settings
from fastdraft_hf.evaluation import bench
from fastdraft_hf.evaluation.journal import Journal
from fastdraft_hf.evaluation.prompts import EvaluationPrompt, draw_prompts
from fastdraft_hf.export.openvino import cached_openvino
from fastdraft_hf.hub.card import best_of_paths
from fastdraft_hf.pipeline.recipe import resolve_device
from fastdraft_hf.pipeline.run import Run

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from fastdraft_hf.decoding.assisted import DraftPath

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
    makers: dict[str, Callable[[Run, PreTrainedTokenizerBase], bench.Decode]] = {
        "transformers": _transformers,
        "ours": functools.partial(_transformers, path="ours"),
        "openvino": _openvino,
        "ours-openvino": _ours_openvino,
    }
    for path in config.paths:
        if path in ("openvino", "ours-openvino") and not openvino_available():
            logger.warning("bench: OpenVINO is not installed, so that path is left out")
            continue
        decode = makers[path](run, tokenizer)
        bench.collect(path, decode, prompts, config, journal)
        results["paths"][path] = bench.summarize(path, prompts, config, journal)
        del decode  # and the models it holds
    write_json(folder / "results.json", results)
    if config.write:
        _write(run, results)
    return {
        path: {
            "best_num_assistant_tokens": found["overall"]["best_num_assistant_tokens"],
            "is_speed_up": found["overall"]["is_speed_up"],
        }
        for path, found in results["paths"].items()
    }


def _write(run: Run, results: dict[str, Any]) -> None:
    """Store the best γ where users of the draft find it: beside its weights."""
    given = run.recipe.design.draft
    folders = [Path(given)] if given is not None else [run.latest_model()]
    exported = sorted(run.stage_folder("export").glob("openvino-*"))
    for order, places in (
        (("transformers", "ours"), folders),
        (("openvino", "ours-openvino"), exported),
    ):
        gamma = best_of_paths(results, order)
        if gamma is None:
            continue
        for place in places:
            store_draft_settings(place, gamma)
            logger.info("bench: num_assistant_tokens %d written to %s", gamma, place)


def _transformers(
    run: Run, tokenizer: PreTrainedTokenizerBase, path: DraftPath = "transformers"
) -> bench.Decode:
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
            path=path,
        )

    return one


def _exported(run: Run) -> tuple[Path, Path]:
    """Return the OpenVINO folders of target and draft."""
    config = run.recipe.bench
    draft = run.stage_folder("export") / f"openvino-{config.weight_format}"
    if not draft.exists():
        raise FastDraftError(
            f"bench.weight_format: {config.weight_format} was not exported; add it to "
            "export.openvino"
        )
    return cached_openvino(run.target.path, config.weight_format), draft


def _ours_openvino(run: Run, tokenizer: PreTrainedTokenizerBase) -> bench.Decode:
    from optimum.intel import OVModelForCausalLM

    from fastdraft_hf.decoding.assisted import decode

    target, draft = (OVModelForCausalLM.from_pretrained(folder) for folder in _exported(run))

    def one(prompt: EvaluationPrompt, gamma: int) -> DecodingRecord:
        record = decode(
            target,
            prompt.ids,
            task=prompt.task,
            key=prompt.key,
            max_new_tokens=run.recipe.bench.max_new_tokens,
            temperature=0.0,
            seed=run.recipe.seed,
            draft=draft if gamma else None,
            num_assistant_tokens=gamma,
            path="ours",
        )
        record.path = "ours-openvino"
        return record

    return one


def _openvino(run: Run, tokenizer: PreTrainedTokenizerBase) -> bench.Decode:
    from fastdraft_hf.decoding.openvino import OpenVINODecoder
    from fastdraft_hf.pipeline.stages.generate import stop_ids

    config = run.recipe.bench
    target, draft = _exported(run)
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
