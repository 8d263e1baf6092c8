"""Stage card: the folder a user loads or pushes: weights, tokenizer, settings, model card."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from fastdraft_hf.stages.runner import STAGES, Run

# What of a training stage's folder is its record, not the model.
_RECORDS = {"config.yaml", "provenance.json", "sessions.json", "log.json", "facts.json"}


def run(run: Run, folder: Path) -> dict[str, Any]:
    """Write a complete draft that works with nothing of ours imported."""
    from fastdraft_hf._atomic import sha256_file
    from fastdraft_hf.decode.settings import store_draft_settings
    from fastdraft_hf.eval.summary import read_summary
    from fastdraft_hf.hub.card import OpenVINOCopy, best_num_assistant_tokens, render_card
    from fastdraft_hf.hub.custom_generate import write_custom_generate
    from fastdraft_hf.hub.run_folder import RunFolder, default_name

    source = run.latest_model()
    for file in source.iterdir():
        if file.is_file() and file.name not in _RECORDS:
            shutil.copy2(file, folder / file.name)
    summary = read_summary({name: run.stage_folder(name) for name in STAGES})
    gamma = best_num_assistant_tokens(summary, run.recipe.evaluate.gammas[0])
    # transformers reads these from the draft and nowhere else.
    store_draft_settings(folder, gamma)
    write_custom_generate(folder)
    target, settings = run.target, run.recipe.card
    name = settings.model_name or default_name(target.name, summary.evaluation)
    facts: dict[str, Any] = {
        "model_name": name,
        "num_assistant_tokens": gamma,
        "weights_from": source.name,
        "license": settings.license or target.license,
        "base_model": settings.base_model,
        "language": settings.language,
    }
    if summary.evaluation is not None:
        location = str(run.stage_folder("card"))
        exported = RunFolder(None, run.folder).openvino_folders()
        card = render_card(
            summary,
            model_name=name,
            target_name=target.name,
            target_revision=target.revision,
            license=facts["license"],
            base_model=settings.base_model,
            language=settings.language,
            draft_location=location,
            num_assistant_tokens=gamma,
            openvino=OpenVINOCopy(exported[0].name, str(exported[0])) if exported else None,
        )
        card.save(folder / "README.md")
        # `fastdraft push` puts the repository's id where the card names this machine's folder, and
        # must know whether somebody has written on it since.
        facts |= {"draft_location": location, "card_sha256": sha256_file(folder / "README.md")}
    return facts
