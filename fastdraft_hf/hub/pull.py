"""A draft from the Hub, checked file by file."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from fastdraft_hf._atomic import sha256_file
from fastdraft_hf._card import DRAFT_FILES
from fastdraft_hf._errors import FastDraftError
from fastdraft_hf.hub.errors import hub_errors, limit_waiting
from fastdraft_hf.hub.files import CARD, PROVENANCE

logger = logging.getLogger(__name__)

_PATTERNS = [*DRAFT_FILES, CARD, PROVENANCE, "openvino-*/*"]


def pull_draft(repo: str, folder: Path | None = None, revision: str | None = None) -> Path:
    """Download a draft: weights, tokenizer, configuration, card, provenance and OpenVINO folders.

    Args:
        repo: its id, ``user/name``.
        folder: where to; by default the Hub's cache, where ``from_pretrained`` looks as well.
        revision: branch, tag or commit.

    Returns:
        the folder that holds it.

    Raises:
        FastDraftError: there is no such draft, it has no safetensors weights, the Hub is out of
            reach, or a file is not what the Hub says it is. The same call goes on where it was.
    """
    from huggingface_hub import HfApi, snapshot_download

    if folder is not None and folder.exists() and not folder.is_dir():
        raise FastDraftError(f"pull: {folder} is a file")
    if folder is not None and (folder / "config.json").exists() and not _pulled(folder):
        raise FastDraftError(f"pull: {folder} holds a model already; give another folder")
    with hub_errors("pull", repo, after="what was received is not asked for again"):
        limit_waiting()
        info = HfApi(library_name="fastdraft_hf").model_info(
            repo, revision=revision, files_metadata=True
        )
        names = {s.rfilename for s in info.siblings or []}
        if not any(n.endswith(".safetensors") and "/" not in n for n in names):
            raise FastDraftError(f"pull: {repo} holds no .safetensors weights; nothing is loaded")
        given: dict[str, Any] = {"revision": info.sha, "allow_patterns": _PATTERNS}
        if folder is not None:
            given["local_dir"] = folder
        place = Path(snapshot_download(repo, **given))
        wrong = _differing(place, info)
        if wrong:  # a disk or a proxy; once more, past every cache
            logger.warning("%s: %s is damaged; downloaded again", repo, ", ".join(wrong))
            given["allow_patterns"] = wrong
            snapshot_download(repo, **given, force_download=True)
            wrong = _differing(place, info)
        if wrong:
            raise FastDraftError(
                f"pull: {wrong[0]} of {repo} is not what the Hub says it is (sha256); give the "
                "same command again"
            )
    return place


def _pulled(folder: Path) -> bool:
    """Whether the client downloaded into this folder before; it keeps its notes there."""
    return (folder / ".cache" / "huggingface").is_dir()


def _differing(place: Path, info: Any) -> list[str]:
    """Return the large files whose content is not the Hub's."""
    wrong = []
    for sibling in info.siblings:
        path = place / sibling.rfilename
        if sibling.lfs is not None and path.is_file() and sha256_file(path) != sibling.lfs.sha256:
            wrong.append(sibling.rfilename)
    return wrong
