"""Stage bench: wall clock of the target alone and with drafts, over γ, through each path."""

from __future__ import annotations

import dataclasses
import gc
import hashlib
import json
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastdraft_hf._atomic import sha256_file, write_json
from fastdraft_hf._errors import FastDraftError
from fastdraft_hf._extras import openvino_available
from fastdraft_hf.decode.settings import store_draft_settings
from fastdraft_hf.draft.vocabulary import Vocabulary, check_vocabulary
from fastdraft_hf.eval import bench, speed
from fastdraft_hf.eval.engines import Models, load_engine, measure_memory
from fastdraft_hf.eval.journal import Journal
from fastdraft_hf.eval.prompts import draw_prompts
from fastdraft_hf.export.openvino import cached_openvino
from fastdraft_hf.hub.card import best_of_paths
from fastdraft_hf.recipe import resolve_device
from fastdraft_hf.stages.runner import Run
from fastdraft_hf.target.resolve import resolve_target, stop_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


def run(run: Run, folder: Path) -> dict[str, Any]:
    """Write ``records.jsonl``, ``memory.json`` and ``results.json``."""
    from transformers import AutoTokenizer

    config = run.recipe.bench
    tokenizer = AutoTokenizer.from_pretrained(run.target.path)
    paths = _available(config.paths)
    models = _models(run, paths, tokenizer)
    _check_begun(folder / "drafts.json", config.drafts, models)
    prompts = draw_prompts(
        tokenizer,
        config.tasks,
        config.prompts_per_task,
        config.max_prompt_tokens,
        run.recipe.seed,
    )
    reduced = _reduced_paths(run, paths)
    models = _with_reduced(run, models, reduced)
    assisted = bench.assisted_settings(
        paths, config.num_assistant_tokens, list(config.drafts), reduced
    )
    results: dict[str, Any] = {"max_new_tokens": config.max_new_tokens}
    if config.memory and assisted:  # before this process holds any model
        results["memory"] = measure_memory(
            models,
            bench.all_settings(assisted),
            prompts,
            config.max_new_tokens,
            folder / "memory.json",
        )
    journal = Journal(folder / "records.jsonl")
    for runtime, members in bench.RUNTIMES.items():
        settings = bench.all_settings([s for s in assisted if s.path in members])
        if settings:
            decode = load_engine(models, settings)
            bench.collect(runtime, decode, settings, prompts, config, journal)
            del decode  # and the models it holds, before the next runtime loads its own
            _release(models.device)
    timings = speed.Timings(journal, prompts, config)
    results |= speed.summarize(timings, assisted, prompts, config)
    write_json(folder / "results.json", results)
    if config.write:
        _write(run, results)
    return {
        name: {
            "best_num_assistant_tokens": found["overall"]["best_num_assistant_tokens"],
            "is_speed_up": found["overall"]["is_speed_up"],
        }
        for name, found in results["paths"].items()
    }


def _available(paths: Sequence[str]) -> list[str]:
    """Return the paths that can be timed here, each once."""
    kept = []
    for path in dict.fromkeys(paths):
        if path in bench.RUNTIMES["openvino"] and not openvino_available():
            logger.warning("bench: OpenVINO is not installed, so path %s is left out", path)
        else:
            kept.append(path)
    return kept


def _models(run: Run, paths: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> Models:
    """Find every model that the paths read, and refuse those that cannot be timed.

    Raises:
        FastDraftError: a draft cannot be had or has another vocabulary, or the weight format
            was not exported.
    """
    config = run.recipe.bench
    target = run.target.path
    drafts = {
        name: str(_other_draft(name, where, target, tokenizer))
        for name, where in config.drafts.items()
    }
    if {"transformers", "ours"} & set(paths):
        drafts[""] = str(run.latest_model())
    target_openvino, drafts_openvino = None, dict[str, str]()
    ends: list[int] = []
    if {"openvino", "ours-openvino"} & set(paths):
        exported = run.stage_folder("export") / f"openvino-{config.weight_format}"
        if not exported.exists():
            raise FastDraftError(
                f"bench.weight_format: {config.weight_format} was not exported; add it to "
                "export.openvino"
            )
        drafts_openvino[""] = str(exported)
    if set(bench.RUNTIMES["openvino"]) & set(paths):
        target_openvino = str(cached_openvino(target, config.weight_format))
        ends = sorted(stop_ids(target, tokenizer))
    return Models(
        target=str(target),
        drafts=drafts,
        target_openvino=target_openvino,
        drafts_openvino=drafts_openvino,
        device=resolve_device(run.recipe.device),
        stop_ids=ends,
        seed=run.recipe.seed,
    )


def _reduced_paths(run: Run, paths: Sequence[str]) -> list[str]:
    """Return the paths on which the draft with a reduced vocabulary is timed."""
    if run.recipe.reduced_vocabulary is None:
        return []
    exported = _reduced_export(run).exists()
    if not exported and {"openvino", "ours-openvino"} & set(paths):
        logger.warning(
            "bench: there is no reduced draft in OpenVINO %s, so it is timed in PyTorch only",
            run.recipe.bench.weight_format,
        )
    return [path for path in paths if exported or path not in bench.RUNTIMES["openvino"]]


def _reduced_export(run: Run) -> Path:
    name = f"{bench.REDUCED}-openvino-{run.recipe.bench.weight_format}"
    return run.stage_folder("export") / name


def _with_reduced(run: Run, models: Models, paths: Sequence[str]) -> Models:
    """Return the models with the reduced draft, where a path reads it."""
    if not paths:
        return models
    drafts = {**models.drafts, bench.REDUCED: str(run.stage_folder("reduced_vocabulary"))}
    openvino = dict(models.drafts_openvino)
    if _reduced_export(run).exists():
        openvino[bench.REDUCED] = str(_reduced_export(run))
    return dataclasses.replace(models, drafts=drafts, drafts_openvino=openvino)


def _other_draft(name: str, where: str, target: Path, tokenizer: PreTrainedTokenizerBase) -> Path:
    """Return the folder of a draft of ``bench.drafts`` that can draft for the target."""
    key = f"bench.drafts.{name}"
    try:
        folder = resolve_target(where).path
    except FastDraftError as error:
        raise FastDraftError(f"{key}: {str(error).removeprefix('target: ')}") from error

    # Rows as well: assisted generation needs as many from both.
    check_vocabulary(Vocabulary.of_folder(target, "the target", tokenizer), folder, key)
    return folder


def _check_begun(path: Path, names: Iterable[str], models: Models) -> None:
    """Refuse to time further prompts with other weights than the first ones were timed with.

    The run's own draft is known by its stage; drafts of ``bench.drafts`` lie anywhere.
    """
    found = {name: _digest(Path(models.drafts[name])) for name in names}
    if not path.exists():
        write_json(path, found)
        return
    begun = json.loads(path.read_text(encoding="utf-8"))
    for name, digest in found.items():
        if begun.get(name) != digest:
            raise FastDraftError(
                f"bench.drafts.{name}: its weights are not those that this bench was begun with; "
                f"bring them back, or delete {path.parent} to time everything anew"
            )


def _digest(folder: Path) -> str:
    """Return one digest of a model's config and weights."""
    files = sorted([*folder.glob("*.safetensors"), folder / "config.json"])
    return hashlib.sha256("".join(sha256_file(file) for file in files).encode()).hexdigest()


def _release(device: str) -> None:
    gc.collect()
    if device == "cuda":
        import torch

        torch.cuda.empty_cache()


def _write(run: Run, results: dict[str, Any]) -> None:
    """Store the best γ where users of the draft find it: beside its weights."""
    given = run.recipe.design.draft
    folders = [Path(given)] if given is not None else [run.latest_model()]
    exported = sorted(run.stage_folder("export").glob("openvino-*"))
    reduced = (
        [] if run.recipe.reduced_vocabulary is None else [run.stage_folder("reduced_vocabulary")]
    )
    reduced_exports = sorted(run.stage_folder("export").glob(f"{bench.REDUCED}-openvino-*"))
    of_reduced = (f"openvino/{bench.REDUCED}", f"ours-openvino/{bench.REDUCED}")
    for order, places in (
        (("transformers", "ours"), folders),
        (("openvino", "ours-openvino"), exported),
        ((f"ours/{bench.REDUCED}",), reduced),
        (of_reduced, reduced_exports),
    ):
        gamma = best_of_paths(results, order)
        if gamma is None:
            continue
        for place in places:
            store_draft_settings(place, gamma)
            logger.info("bench: num_assistant_tokens %d written to %s", gamma, place)
