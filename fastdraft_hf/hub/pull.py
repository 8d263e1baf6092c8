"""A draft from the Hub, checked file by file."""

from __future__ import annotations

from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from fastdraft_hf._atomic import sha256_file
from fastdraft_hf._card import CARD, DRAFT_FILES, PROVENANCE
from fastdraft_hf._errors import FastDraftError
from fastdraft_hf.hub.errors import hub_errors

_PATTERNS = [*DRAFT_FILES, CARD, PROVENANCE, "custom_generate/*", "openvino-*/*"]


def pull_draft(repo_id: str, folder: Path | None = None, revision: str | None = None) -> Path:
    """Download a draft: weights, tokenizer, configuration, card, provenance and OpenVINO folders.

    Args:
        repo_id: its id, ``user/name``.
        folder: where to; by default the Hub's cache, where ``from_pretrained`` looks too.
        revision: branch, tag or commit.

    Returns:
        the folder.

    Raises:
        FastDraftError: there is no such draft, it has no safetensors weights or a file name that
            leads out of the folder, the Hub is out of reach, or a file is not what the Hub says it
            is. The same call then fetches what is missing.
    """
    from huggingface_hub import HfApi, snapshot_download

    if folder is not None and folder.exists() and not folder.is_dir():
        raise FastDraftError(f"pull: {folder} is a file")
    # The client keeps its notes in .cache/ of a folder that it filled.
    pulled_before = folder is not None and (folder / ".cache" / "huggingface").is_dir()
    if folder is not None and (folder / "config.json").exists() and not pulled_before:
        raise FastDraftError(f"pull: {folder} already holds a model; give another folder")
    with hub_errors("pull", repo_id):
        info = HfApi(library_name="fastdraft_hf").model_info(
            repo_id, revision=revision, files_metadata=True
        )
        names = [sibling.rfilename for sibling in info.siblings or []]
        for name in names:
            if not _is_inside(name):
                raise FastDraftError(f"pull: {repo_id} has a file named {name!r}; not downloaded")
        if not any(name.endswith(".safetensors") and "/" not in name for name in names):
            raise FastDraftError(f"pull: {repo_id} holds no .safetensors weights; not downloaded")
        given: dict[str, Any] = {"revision": info.sha, "local_dir": folder}
        place = Path(snapshot_download(repo_id, allow_patterns=_PATTERNS, **given))
        wrong = _damaged(place, info)
        if wrong:  # a disk or a proxy: once more, past every cache
            snapshot_download(repo_id, allow_patterns=wrong, force_download=True, **given)
            wrong = _damaged(place, info)
        if wrong:
            raise FastDraftError(
                f"pull: {wrong[0]} of {repo_id} is not what the Hub says it is (sha256); run the "
                "same command again"
            )
    return place


def _is_inside(name: str) -> bool:
    """Return whether a name in a repository stays in its folder, on every system."""
    return name.isprintable() and not any(
        path.is_absolute() or path.drive or path.root or ".." in path.parts
        for path in (PurePosixPath(name), PureWindowsPath(name))
    )


def _damaged(place: Path, info: Any) -> list[str]:
    """Return the large files whose content is not the Hub's."""
    return [
        sibling.rfilename
        for sibling in info.siblings
        if sibling.lfs is not None
        and (place / sibling.rfilename).is_file()
        and sha256_file(place / sibling.rfilename) != sibling.lfs.sha256
    ]
