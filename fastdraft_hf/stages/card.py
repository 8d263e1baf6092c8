"""Stage card: the folder that a user loads or pushes: weights, tokenizer, settings, model card."""

import shutil
from pathlib import Path
from typing import Any

from fastdraft_hf._atomic import read_json, sha256_file
from fastdraft_hf._card import CARD, draft_files
from fastdraft_hf.decode.settings import store_draft_settings
from fastdraft_hf.eval.summary import read_summary
from fastdraft_hf.hub.card import best_of_paths, render_card
from fastdraft_hf.hub.folder import RunFolder, default_name, write_custom_generate
from fastdraft_hf.stages.run import Run


def run(run: Run, folder: Path) -> dict[str, Any]:
    """Write a complete draft that works without this package."""
    source = run.latest_model()
    for name, file in draft_files(source).items():
        shutil.copy2(file, folder / name)
    summary = read_summary(run.folders)
    # Stock transformers comes before our own loop, whose users can pass another γ.
    best = best_of_paths(summary.bench, ("transformers", "ours"))
    gamma = best or run.recipe.evaluate.gammas[0]
    # transformers reads these from the draft and nowhere else.
    store_draft_settings(folder, gamma)
    write_custom_generate(folder)
    target, settings = run.target, run.recipe.card
    facts: dict[str, Any] = {
        "model_name": settings.model_name or default_name(target.name, summary.evaluation),
        "num_assistant_tokens": gamma,
        "license": settings.license or target.license,
        "base_model": settings.base_model,
        "language": settings.language,
        "parallel_drafting": read_json(folder / "config.json").get("pard_token") is not None,
    }
    if summary.evaluation is None:
        return facts
    location = run.stage_folder("card")
    exported = RunFolder(location, run.folder).openvino_folders()
    card = render_card(
        summary,
        {**facts, "target": target.name, "target_revision": target.revision},
        draft_location=str(location),
        openvino=exported[0].resolve().as_posix() if exported else None,
    )
    card.save(folder / CARD)
    # A push renders the card again for its repository, unless somebody edited it.
    return {**facts, "card_sha256": sha256_file(folder / CARD)}
