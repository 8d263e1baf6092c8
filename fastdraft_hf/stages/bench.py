"""Stage bench: wall clock of the target alone and with drafts, over γ, through each path."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastdraft_hf._atomic import write_json
from fastdraft_hf._errors import FastDraftError
from fastdraft_hf.eval import bench
from fastdraft_hf.eval.prompts import draw_prompts
from fastdraft_hf.eval.speed import summarize
from fastdraft_hf.eval.summary import cut_words
from fastdraft_hf.export.openvino import cached_openvino, openvino_obstacle
from fastdraft_hf.recipe import resolve_device
from fastdraft_hf.stages import deadline
from fastdraft_hf.stages.run import Run
from fastdraft_hf.target.resolve import stop_ids

logger = logging.getLogger(__name__)

# OpenVINO paths that read a draft.
_OPENVINO_DRAFTS = {"openvino", "ours-openvino"}


def run(run: Run, folder: Path) -> dict[str, Any]:
    """Write ``records.jsonl`` and ``results.json``."""
    config = run.recipe.bench
    tokenizer = run.chat_tokenizer()
    paths = _available(run)
    models = _models(run, paths, sorted(stop_ids(run.target.path, tokenizer)))
    longest = run.longest_prompt(config)
    prompts = draw_prompts(
        tokenizer, config.tasks, config.prompts_per_task, longest, run.recipe.seed
    )
    assisted = bench.assisted_settings(paths, config.num_assistant_tokens)
    config = config.model_copy(update={"max_minutes": deadline.minutes(run, "bench")})
    timed = bench.run_bench(models, assisted, prompts, config, folder)
    results = summarize(timed, [one for one in assisted if one in timed])
    measured = [len(records) for records in timed.values()] or [0]
    counts = {"drawn": len(prompts), "measured": min(measured), "most": max(measured)}
    missing = [f"{s.path} γ {s.num_assistant_tokens}" for s in assisted if s not in timed]
    results |= {"prompts": counts, "left_out": missing}
    write_json(folder / "results.json", results)
    return {"cut": [cut_words(results)]} | {
        name: {key: found["overall"][key] for key in ("best_num_assistant_tokens", "is_speed_up")}
        for name, found in results["paths"].items()
    }


def _available(run: Run) -> list[str]:
    """Return the paths that can be timed with these models on this machine, each once."""
    kept: list[str] = []
    for path in dict.fromkeys(run.recipe.bench.paths):
        models = [run.target.path] if path in bench.OPENVINO else []
        if path in _OPENVINO_DRAFTS:
            models.append(run.latest_model())
        obstacles = [found for one in models if (found := openvino_obstacle(one)) is not None]
        if obstacles:
            logger.warning("bench: path %s is left out: %s", path, obstacles[0])
        else:
            kept.append(path)
    return kept


def _models(run: Run, paths: Sequence[str], stop_ids: list[int]) -> bench.Models:
    """Find every model that the paths read; refuse a weight format that was not exported."""
    target, weight_format = run.target.path, run.recipe.bench.weight_format
    exported = run.stage_folder("export") / f"openvino-{weight_format}"
    if _OPENVINO_DRAFTS & set(paths) and not exported.exists():
        raise FastDraftError(
            f"bench.weight_format: {weight_format} was not exported; add it to export.openvino"
        )
    on_openvino = bool(set(bench.OPENVINO) & set(paths))
    return bench.Models(
        target=str(target),
        draft=str(run.latest_model()),
        target_openvino=str(cached_openvino(target, weight_format)) if on_openvino else "",
        draft_openvino=str(exported),
        device=resolve_device(run.recipe.device),
        stop_ids=stop_ids,
        server=run.recipe.bench.server or "",
        server_alone=run.recipe.bench.server_alone or "",
    )
