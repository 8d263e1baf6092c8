"""Stage card: the folder a user loads or pushes: weights, tokenizer, settings, model card."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

from fastdraft_hf.pipeline.run import STAGES, Run

# What of a training stage's folder is its record, not the model.
_RECORDS = {"config.yaml", "provenance.json", "sessions.json", "log.json", "facts.json"}


def run(run: Run, folder: Path) -> dict[str, Any]:
    """Write a complete draft that works with nothing of ours imported."""
    from fastdraft_hf.decoding.settings import store_draft_settings
    from fastdraft_hf.evaluation.summary import read_summary
    from fastdraft_hf.hub.card import best_num_assistant_tokens, render_card
    from fastdraft_hf.hub.custom_generate import write_custom_generate

    source = run.latest_model()
    for file in source.iterdir():
        if file.is_file() and file.name not in _RECORDS:
            shutil.copy2(file, folder / file.name)
    summary = read_summary({name: run.stage_folder(name) for name in STAGES})
    gamma = best_num_assistant_tokens(summary, run.recipe.evaluate.gammas[0])
    # transformers reads these from the draft and nowhere else.
    store_draft_settings(folder, gamma)
    write_custom_generate(folder)
    target = run.target
    name = run.recipe.card.model_name or _default_name(target.name, summary.evaluation)
    if summary.evaluation is not None:
        card = render_card(
            summary,
            model_name=name,
            target_name=target.name,
            target_revision=target.revision,
            licence=run.recipe.card.licence or target.licence,
            draft_location=str(run.stage_folder("card")),
            num_assistant_tokens=gamma,
        )
        card.save(folder / "README.md")
    return {"model_name": name, "num_assistant_tokens": gamma, "weights_from": source.name}


def _default_name(target: str, evaluation: dict[str, Any] | None) -> str:
    base = re.sub(r"[^A-Za-z0-9._-]", "-", target.split("/")[-1])
    if evaluation is None:
        return f"{base}-FastDraft"
    return f"{base}-FastDraft-{evaluation['draft_parameters'] / 1e6:.0f}M"
