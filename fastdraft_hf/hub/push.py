"""A draft's files to the Hub in one commit, and back, checked file by file.

Large files go to the Hub's storage first, under their hashes, and the commit names them. The client
does not send them again after a call that broke off. A repository that such a call made stays,
empty, because the stored files belong to it.
"""

import contextlib
import fnmatch
import json
from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from huggingface_hub import HfApi, errors, get_session, get_token, snapshot_download
from huggingface_hub.errors import RepositoryNotFoundError

from fastdraft_hf._card import CARD, DRAFT_FILES, PROVENANCE, load_card
from fastdraft_hf._errors import FastDraftError, redacted

# A pull fetches these. A later push deletes them where it no longer has them; other files stay.
_MANAGED = (*DRAFT_FILES, PROVENANCE, "custom_generate/*", "openvino-*/*")

# The client waits without a limit by default. This one is between two packets, not for an upload.
TIMEOUT_SECONDS = 60.0
# huggingface_hub 1 uses httpx, version 2 uses httpx2: the package marks a network fault.
_NETWORK_PACKAGES = {"httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3", "hf_xet"}


@contextlib.contextmanager
def hub_errors(doing: str) -> Iterator[None]:
    """Turn the Hub client's errors into `FastDraftError`: one line, without credentials."""
    try:
        get_session().timeout = TIMEOUT_SECONDS
        yield
    except FastDraftError:
        raise
    except Exception as raised:
        # A failed upload is a RuntimeError that names the file; its cause says what happened.
        cause = raised.__cause__
        error = cause if isinstance(raised, RuntimeError) and cause is not None else raised
        network = type(error).__module__.partition(".")[0] in _NETWORK_PACKAGES
        if not network and not isinstance(error, (OSError, EOFError, ValueError)):
            raise
        # Redact before cutting: half of a token is not recognized.
        text = redacted(" ".join(str(error).split()), get_token()) or type(error).__name__
        text = text if len(text) <= 250 else f"{text[:250]}..."
        answered = (
            errors.HfHubHTTPError,
            errors.LocalTokenNotFoundError,
            errors.OfflineModeIsEnabled,
            ValueError,
        )
        if not isinstance(error, answered) or isinstance(error, json.JSONDecodeError):
            text = f"the Hub could not be reached or broke off ({text}); run the same command again"
        # No cause: its text may contain a request's headers.
        raise FastDraftError(f"{doing}: {text}") from None


def push(
    files: Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    overwrite: bool = False,
) -> str:
    """Send a folder to a model repository, which is created if it does not exist.

    Args:
        files: a folder that `fastdraft_hf.hub.folder.gather` filled.
        repo_id: the repository, ``user/name``.
        private: make a new repository private; one that exists keeps its visibility.
        revision: the branch, created if it does not exist; by default ``main``.
        overwrite: replace everything in a repository that holds something else.

    Returns:
        the repository's page.

    Raises:
        FastDraftError: no token or a wrong one, the name is taken, or the Hub cannot be reached.
            The same call then sends what is missing.
    """
    api = HfApi(library_name="fastdraft_hf")
    card = load_card((files / CARD).read_text(encoding="utf-8"))
    with hub_errors("push"):
        api.whoami()
        if not overwrite:
            _refuse_other_content(api, repo_id, card.data.base_model)
        api.create_repo(repo_id, private=private, exist_ok=True)
        if revision not in (None, "main"):
            api.create_branch(repo_id, branch=str(revision), exist_ok=True)
        info = api.model_info(repo_id, revision=revision)
        stale = [
            name
            for name in (sibling.rfilename for sibling in info.siblings or [])
            if not (files / name).exists() and (overwrite or _is_managed(name))
        ]
        api.upload_folder(
            repo_id=repo_id,
            folder_path=files,
            commit_message="Draft made with fastdraft_hf",
            revision=revision,
            parent_commit=info.sha,
            delete_patterns=stale,
        )
    return f"{api.endpoint}/{repo_id}"


def _is_managed(name: str) -> bool:
    # A pattern without a slash means the top folder only.
    return any(
        fnmatch.fnmatch(name, pattern) and name.count("/") == pattern.count("/")
        for pattern in _MANAGED
    )


def _refuse_other_content(api: HfApi, repo_id: str, base_model: Any) -> None:
    try:
        info = api.model_info(repo_id)
    except RepositoryNotFoundError:
        return
    if {sibling.rfilename for sibling in info.siblings or []} <= {".gitattributes"}:
        return
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


def pull(repo_id: str, folder: Path | None = None, revision: str | None = None) -> Path:
    """Download a draft: weights, tokenizer, configuration, card, provenance and OpenVINO folders.

    Args:
        repo_id: its id, ``user/name``.
        folder: where to; by default the Hub's cache, where ``from_pretrained`` looks too.
        revision: branch, tag or commit.

    Returns:
        the folder.

    Raises:
        FastDraftError: the repository does not exist, has no safetensors weights or a file name
            that leads out of the folder, the Hub cannot be reached, or a file is not what the Hub
            says it is. The same call then fetches what is missing.
    """
    if folder is not None and folder.exists() and not folder.is_dir():
        raise FastDraftError(f"pull: {folder} is a file")
    # The client keeps its notes in .cache/ of a folder that it filled.
    pulled_before = folder is not None and (folder / ".cache" / "huggingface").is_dir()
    if folder is not None and (folder / "config.json").exists() and not pulled_before:
        raise FastDraftError(f"pull: {folder} already holds a model; give another folder")
    api = HfApi(library_name="fastdraft_hf")
    with hub_errors("pull"):
        info = api.model_info(repo_id, revision=revision)
        names = [sibling.rfilename for sibling in info.siblings or []]
        for name in names:
            if not _is_inside(name):
                raise FastDraftError(f"pull: {repo_id} has a file named {name!r}; not downloaded")
        if not any(name.endswith(".safetensors") and "/" not in name for name in names):
            raise FastDraftError(f"pull: {repo_id} holds no .safetensors weights; not downloaded")
        wrong = [*_MANAGED, CARD]
        for again in (False, True):  # a disk or a proxy: once more, past every cache
            given: Any = {"revision": info.sha, "local_dir": folder, "force_download": again}
            place = Path(snapshot_download(repo_id, allow_patterns=wrong, **given))
            checked = api.verify_repo_checksums(repo_id, revision=info.sha, local_dir=place)
            wrong = [mismatch["path"] for mismatch in checked.mismatches]
            if not wrong:
                return place
        raise FastDraftError(
            f"pull: {wrong[0]} of {repo_id} is not what the Hub says it is; run the same command "
            "again"
        )


def _is_inside(name: str) -> bool:
    """Return whether a name in a repository stays in its folder, on every system."""
    return name.isprintable() and not any(
        path.is_absolute() or path.drive or path.root or ".." in path.parts
        for path in (PurePosixPath(name), PureWindowsPath(name))
    )
