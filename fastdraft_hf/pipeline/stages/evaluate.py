"""Stage evaluate: acceptance on held-out prompts, and greedy output compared token for token."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from fastdraft_hf._atomic import write_json
from fastdraft_hf.pipeline.recipe import resolve_device
from fastdraft_hf.pipeline.run import Run

logger = logging.getLogger(__name__)


def run(run: Run, folder: Path) -> dict[str, Any]:
    """Write ``records.jsonl`` and ``results.json``."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from fastdraft_hf.drafts.vocabulary import check_same_vocabulary
    from fastdraft_hf.evaluation import evaluate
    from fastdraft_hf.evaluation.journal import Journal
    from fastdraft_hf.evaluation.prompts import draw_prompts

    config = run.recipe.evaluate
    device = resolve_device(run.recipe.device)
    draft_folder = run.latest_model()
    tokenizer = AutoTokenizer.from_pretrained(run.target.path)
    check_same_vocabulary(tokenizer, AutoTokenizer.from_pretrained(draft_folder), draft_folder)

    def load(path: Path) -> Any:
        # float32: whether greedy output changes is asked of the models, not of a rounding.
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        return model.to(device).eval()

    target, draft = load(run.target.path), load(draft_folder)
    # A draft that was given is not untrained, and one that was only designed is measured anyway.
    started = run.stage_folder("design")
    wanted = config.untrained_prompts_per_task and run.recipe.design.draft is None
    untrained = load(started) if wanted and draft_folder != started else None
    prompts = draw_prompts(
        tokenizer,
        config.tasks,
        config.prompts_per_task,
        config.max_prompt_tokens,
        run.recipe.seed,
    )
    journal = Journal(evaluate.save_path(folder))
    evaluate.collect(target, draft, untrained, prompts, config, journal, run.recipe.seed)
    differences = evaluate.compare_greedy(target, prompts, journal)
    results = evaluate.summarize(
        prompts,
        journal,
        config,
        target_parameters=target.num_parameters(),
        draft_parameters=draft.num_parameters(),
        differences=differences,
    )
    write_json(folder / "results.json", results)
    faults = [d for d in differences if not d["tie"]]
    if faults:
        logger.error(
            "greedy output differs from the target's on %d prompts: %s", len(faults), faults
        )
    return {
        "greedy_identical": results["greedy_identical"],
        "greedy_prompts": results["greedy_prompts"],
        "acceptance_rate": results["overall"]["sampled"]["acceptance_rate"],
    }
