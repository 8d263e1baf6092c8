"""`fastdraft push`: the files of a draft's repository, rounded weights measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastdraft_hf._card import Files, check_texts
from fastdraft_hf._errors import FastDraftError
from fastdraft_hf._metadata import is_model_id
from fastdraft_hf.decode.settings import read_draft_tokens
from fastdraft_hf.hub.folder import cast_weights, repository_files
from fastdraft_hf.hub.run_folder import find_run


def prepare(
    folder: Path,
    repo_id: str,
    scratch: Path,
    *,
    openvino: bool = False,
    dtype: str | None = None,
    target: str | None = None,
) -> Files:
    """Gather what a push sends, without reaching the Hub.

    Args:
        folder: a run's folder, or a draft's.
        repo_id: the draft's repository, ``user/name``; the card loads the draft from it.
        scratch: an empty folder for rounded weights; the result refers to files in it.
        openvino: add the draft's OpenVINO folders.
        dtype: store the weights in this type; ``None`` keeps theirs.
        target: measure the expected acceptance with this target before and after rounding.

    Raises:
        FastDraftError: something is missing or not fit to be published, or the target's vocabulary
            is another one.
    """
    from huggingface_hub import get_token

    from fastdraft_hf.stages.provenance import describe

    if not is_model_id(repo_id, owner=True):
        raise FastDraftError(f"--repo-id: '{repo_id}' is not a repository id such as user/name")
    found = find_run(folder)
    gamma = read_draft_tokens(found.draft)
    if gamma is None:
        raise FastDraftError(
            f"{found.draft}: generation_config.json has no num_assistant_tokens, so transformers "
            "would draft 20 tokens per round; set it, such as to 3"
        )
    files = repository_files(found, repo_id, openvino=openvino)  # refuse before any work
    types = cast_weights(found.draft, scratch, dtype) if dtype else [dtype]
    if dtype is not None and types != [dtype]:
        facts: dict[str, Any] = {"dtype": dtype, "cast_from": types}
        if target is not None:
            facts["acceptance"] = _measure(target, found.draft, scratch, gamma)
        facts["note"] = _note(facts)
        files = repository_files(
            found,
            repo_id,
            cast=scratch,
            openvino=openvino,
            weights_note=facts["note"],
            records={"push": {"stage": "push", **describe(facts=facts)}},
        )
    check_texts(files, get_token())
    return files


def _measure(target: str, draft: Path, cast: Path, gamma: int) -> dict[str, Any]:
    """Return the expected acceptance of a draft before and after rounding."""
    from fastdraft_hf.draft.reduced_vocabulary import load_draft
    from fastdraft_hf.draft.vocabulary import Vocabulary, check_vocabulary
    from fastdraft_hf.stages.export import read_acceptance
    from fastdraft_hf.target.resolve import resolve_target

    path = resolve_target(target).path
    check_vocabulary(Vocabulary.of_folder(path, "the target"), draft)
    forms = {
        "before": lambda: load_draft(draft, dtype="float32"),
        "after": lambda: load_draft(cast, dtype="auto"),
    }
    return read_acceptance(path, forms, num_assistant_tokens=gamma)


def _note(facts: dict[str, Any]) -> str:
    """Return what the card says about the rounding."""
    words = (
        f"The weights are stored in {facts['dtype']}; the figures below were measured with "
        f"{' and '.join(facts['cast_from'])}."
    )
    reading = facts.get("acceptance")
    if reading is None:
        return f"{words} The effect of rounding on acceptance was not measured."
    before, after = (one["acceptance_rate"] for one in reading["drafts"])
    return (
        f"{words} Over {reading['texts']} texts of the target (γ = "
        f"{reading['num_assistant_tokens']}, T = {reading['temperature']:g}) the expected "
        f"acceptance rate is {before:.4f} before rounding and {after:.4f} after it."
    )
