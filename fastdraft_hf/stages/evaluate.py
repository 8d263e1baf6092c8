"""Stage evaluate: acceptance on held-out prompts, and greedy output compared token for token."""

import logging
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from fastdraft_hf import _processes
from fastdraft_hf._atomic import write_json
from fastdraft_hf.data.task_sets import digest, load_task_set, settings_of
from fastdraft_hf.draft.reduced_vocabulary import load_draft
from fastdraft_hf.draft.vocabulary import Vocabulary, check_vocabulary
from fastdraft_hf.eval.evaluate import evaluate
from fastdraft_hf.eval.prompts import draw_prompts
from fastdraft_hf.eval.summary import TRAINING_STAGES, cut_words
from fastdraft_hf.hub.folder import read_record
from fastdraft_hf.recipe import resolve_device
from fastdraft_hf.stages import deadline
from fastdraft_hf.stages.run import Run

logger = logging.getLogger(__name__)


def run(run: Run, folder: Path) -> dict[str, Any]:
    """Write ``records.jsonl`` and ``results.json``."""

    config = run.recipe.evaluate
    device = resolve_device(run.recipe.device)
    draft_folder = run.latest_model()
    tokenizer = run.chat_tokenizer()
    check_vocabulary(Vocabulary.of_folder(run.target.path, "the target", tokenizer), draft_folder)

    # Before the models are loaded: a task set that cannot be read is reported at once.
    longest = run.longest_prompt(config)
    prompts = draw_prompts(
        tokenizer, config.tasks, config.prompts_per_task, longest, run.recipe.seed
    )
    trained_on = not_held_out(run)
    if trained_on and _processes.is_main():
        logger.warning(
            "evaluate: training did not leave out the text of %s; acceptance may be overstated",
            ", ".join(trained_on),
        )

    def load(path: Path) -> Any:
        # Stock assisted generation would take the columns of a reduced vocabulary for ids.
        read = load_draft if config.path == "ours" else AutoModelForCausalLM.from_pretrained
        # float32: whether greedy output changes is a question about the models, not rounding.
        model = read(path, dtype=torch.float32, trust_remote_code=False)
        return model.to(device).eval()

    target, draft = load(run.target.path), load(draft_folder)
    designed = run.stage_folder("design")  # if nothing was trained, it is measured anyway
    wanted = config.untrained_prompts_per_task and draft_folder != designed
    untrained = load(designed) if wanted else None
    limit = _processes.on_main(lambda: deadline.minutes(run, "evaluate"))
    config = config.model_copy(update={"max_minutes": limit})
    results = evaluate(
        target, draft, prompts, config, folder, seed=run.recipe.seed, untrained=untrained
    )
    if results is None:  # not the main process
        return {}
    results["not_held_out"] = trained_on
    write_json(folder / "results.json", results)
    faults = [d for d in results["greedy_differences"] if not d["tie"]]
    if faults:
        logger.error(
            "greedy output differs from the target's on %d prompts: %s", len(faults), faults
        )
    facts = {key: results[key] for key in ("greedy_identical", "greedy_prompts")}
    facts["acceptance_rate"] = results["overall"]["sampled"]["acceptance_rate"]
    return {**facts, "cut": [cut_words(results)]}


def not_held_out(run: Run) -> list[str]:
    """Return the tasks whose text some training stage of this run did not leave out.

    Tasks may be named after training, or a dataset may have changed since. A draft that was given
    was trained elsewhere, on text that nobody checked here.
    """
    records = [read_record(run.stage_folder(stage)) for stage in TRAINING_STAGES]
    held_out = [one["facts"].get("data", {}).get("held_out") or {} for one in records if one]
    found = []
    for name, settings in settings_of(run.recipe.evaluate.tasks):
        if not held_out:
            continue
        own = digest(load_task_set(name, settings))
        if any(own not in one.get(name, ()) for one in held_out):
            found.append(name)
    return found
