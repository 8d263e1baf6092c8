"""A draft's files to the Hub, in one commit.

Large files go to the Hub's storage first, under their hashes, and the commit names them. The client
does not send them again after a call that broke off. A repository that such a call made stays,
empty, because the stored files belong to it.
"""

from __future__ import annotations

import fnmatch
import logging
from typing import TYPE_CHECKING, Any

from fastdraft_hf._card import CARD, DRAFT_FILES, PROVENANCE, Files, check_texts, load_card
from fastdraft_hf._errors import FastDraftError
from fastdraft_hf.hub.errors import hub_errors

if TYPE_CHECKING:
    from huggingface_hub import HfApi

logger = logging.getLogger(__name__)

# A later push deletes these where it no longer has them. Files that somebody added stay.
_MANAGED = (*DRAFT_FILES, PROVENANCE, "custom_generate/*", "openvino-*/*")


def push(
    files: Files,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    overwrite: bool = False,
    message: str = "Draft made with fastdraft_hf",
) -> str:
    """Send files to a model repository, which is created if it does not exist.

    Args:
        files: paths in the repository to their content; a card is among them.
        repo_id: the repository, ``user/name``.
        private: make a new repository private; one that exists keeps its visibility.
        revision: the branch, created if it does not exist; by default ``main``.
        overwrite: replace everything in a repository that holds something else.
        message: the commit's.

    Returns:
        the repository's page.

    Raises:
        FastDraftError: no token or a wrong one, a file holds a token, the name is taken, or the
            Hub cannot be reached. The same call then sends what is missing.
    """
    from huggingface_hub import HfApi, get_token

    token = get_token()
    if token is None:
        raise FastDraftError("push: no token: run `hf auth login`, or set HF_TOKEN")
    check_texts(files, token)
    card = files[CARD]
    assert isinstance(card, bytes)
    api = HfApi(library_name="fastdraft_hf")
    with hub_errors("push", repo_id):
        api.whoami(token=token)
        if not _exists(api, repo_id, load_card(card.decode()).data.base_model, overwrite):
            api.create_repo(repo_id, private=private, exist_ok=True)
        _commit(api, repo_id, files, revision, overwrite, message)
    return f"{api.endpoint}/{repo_id}"


def _exists(api: HfApi, repo_id: str, base_model: Any, overwrite: bool) -> bool:
    """Return whether the repository exists; refuse one that holds something else."""
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        info = api.model_info(repo_id)
    except RepositoryNotFoundError:
        return False
    if overwrite or {s.rfilename for s in info.siblings or []} <= {".gitattributes"}:
        return True
    there: Any = info.card_data or {}
    if "fastdraft" not in (there.get("tags") or []):
        raise FastDraftError(
            f"push: {repo_id} exists and was not made by fastdraft_hf; choose another name, or "
            "replace its content with --overwrite"
        )
    if there.get("base_model") not in (None, base_model):
        raise FastDraftError(
            f"push: {repo_id} is a draft for {there.get('base_model')}, not for {base_model}; "
            "choose another name, or replace its content with --overwrite"
        )
    return True


def _commit(
    api: HfApi, repo_id: str, files: Files, revision: str | None, overwrite: bool, message: str
) -> None:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    if revision not in (None, "main"):
        api.create_branch(repo_id, branch=str(revision), exist_ok=True)
    info = api.model_info(repo_id, revision=revision)
    there = {s.rfilename for s in info.siblings or []} - {".gitattributes", *files}
    # A pattern without a slash means the top folder only.
    stale = [
        name
        for name in sorted(there)
        if overwrite
        or any(
            fnmatch.fnmatch(name, pattern) and name.count("/") == pattern.count("/")
            for pattern in _MANAGED
        )
    ]
    commit = api.create_commit(
        repo_id,
        [
            *(CommitOperationDelete(name) for name in stale),
            *(CommitOperationAdd(path, content) for path, content in files.items()),
        ],
        commit_message=message,
        revision=revision,
        parent_commit=info.sha,
    )
    logger.info("%s: commit %s", repo_id, commit.oid)
