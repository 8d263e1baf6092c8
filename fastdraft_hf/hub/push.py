"""A draft, and what the target wrote for it, to the Hub: each repository in one commit.

Nothing of a repository is visible before its commit: large files go to the Hub's storage first,
under their hashes, and the commit names them. What was sent before a broken call is not sent again
by the next one. A repository that a broken call made stays, empty, because those files hang on it.
"""

from __future__ import annotations

import fnmatch
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fastdraft_hf._atomic import sha256_file
from fastdraft_hf._card import DRAFT_FILES, TAGS
from fastdraft_hf._errors import FastDraftError
from fastdraft_hf.hub.card import OpenVINOCopy
from fastdraft_hf.hub.dataset_card import dataset_files
from fastdraft_hf.hub.errors import hub_errors, limit_waiting
from fastdraft_hf.hub.files import (
    CARD,
    PROVENANCE,
    RepoFile,
    check_files,
    draft_files,
    openvino_files,
    provenance_file,
)
from fastdraft_hf.hub.metadata import check_metadata, check_model_id
from fastdraft_hf.hub.run_folder import RunFolder, card_of_run, find_run, read_record

if TYPE_CHECKING:
    from huggingface_hub import HfApi

logger = logging.getLogger(__name__)

# What an earlier push may have left and a later one takes away when it no longer has it. Files
# somebody added on the Hub stay.
_MANAGED = {
    "model": (*DRAFT_FILES, PROVENANCE, "openvino-*/*"),
    "dataset": ("*/part-*.parquet", "*/manifest.json"),
}
_OF_THE_HUB = ".gitattributes"


@dataclass(frozen=True)
class RepoPlan:
    """What one repository will hold.

    Attributes:
        repo: its id, ``user/name``.
        repo_type: ``model`` or ``dataset``.
        files: the files of the commit.
        base_model: the target's id.
    """

    repo: str
    repo_type: Literal["model", "dataset"]
    files: list[RepoFile]
    base_model: str

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(file.size for file in self.files)


def plan_push(
    folder: Path,
    repo: str,
    *,
    dataset: str | None = None,
    openvino: bool = False,
    weights_note: str = "",
    records: dict[str, dict[str, Any]] | None = None,
) -> list[RepoPlan]:
    """Say what a push would send, without asking the Hub anything.

    Args:
        folder: a run's folder, or a draft's.
        repo: the draft's repository, ``user/name``.
        dataset: the repository of the generated sets, ``user/name``; ``None`` leaves them out.
        openvino: whether the draft's OpenVINO folders go with it.
        weights_note: put on the card where it is rendered anew.
        records: put beside the stages' records.

    Returns:
        the dataset's plan, if there is one, and the draft's, in the order in which they are sent.

    Raises:
        FastDraftError: something is missing or not fit to be published; the file is named.
    """
    for option, name in (("--repo", repo), ("--dataset", dataset)):
        if name is not None:
            check_model_id(name, option)
            if "/" not in name:
                raise FastDraftError(f"{option}: give the owner as well, such as user/{name}")
    found = find_run(folder)
    if found.draft is None:
        raise FastDraftError(
            f"{folder} holds no finished draft yet; run `fastdraft card --output-dir {folder}`"
        )
    exported = found.openvino_folders() if openvino else []
    if openvino and not exported:
        raise FastDraftError(f"--openvino: {folder} holds no OpenVINO folder of the draft")
    sets = found.generated_sets() if dataset else []
    if dataset and not sets:
        raise FastDraftError(f"--dataset: {folder} holds no finished sets that the target wrote")
    card = _card(found, repo, dataset, exported[0].name if exported else None, weights_note)
    files = [RepoFile(CARD, str(card.content).encode()), *draft_files(found.draft)]
    stages = {**(found.summary.provenance or _records(found.draft)), **(records or {})}
    if any(stages.values()):
        files.append(provenance_file(stages))
    files += openvino_files(exported)
    base_model = str(card.data.base_model)
    plans = [RepoPlan(repo, "model", files, base_model)]
    if dataset:
        rows = dataset_files(
            sets, target=base_model, base_model=base_model, license=card.data.get("license")
        )
        plans.insert(0, RepoPlan(dataset, "dataset", rows, base_model))
    return plans


def _records(draft: Path) -> dict[str, Any]:
    """Return what a draft without its run says: its stage's record, or all it was pushed with."""
    record = read_record(draft)
    return {"draft": record} if "stage" in record or not record else record


def _card(
    found: RunFolder, repo: str, dataset: str | None, openvino: str | None, weights_note: str
) -> Any:
    """Return the card for the repository: rendered anew, unless somebody wrote on it."""
    from huggingface_hub import ModelCard

    assert found.draft is not None
    path = found.draft / CARD
    record = read_record(found.draft)
    facts = record.get("ship", record).get("facts", {})
    edited = path.is_file() and facts.get("card_sha256") != sha256_file(path)
    datasets = [dataset] if dataset else []
    if found.summary.evaluation is not None and not edited:
        copy = OpenVINOCopy(openvino) if openvino else None
        card = card_of_run(
            found,
            draft_location=repo,
            openvino=copy,
            datasets=datasets,
            weights_note=weights_note,
        )
    elif path.is_file():
        text = path.read_text(encoding="utf-8")
        places = {facts.get("draft_location"), str(found.draft), str(found.draft.resolve())}
        for place in sorted((p for p in places if p), key=len, reverse=True):
            text = text.replace(f'"{place}"', f'"{repo}"').replace(f" {place} ", f" {repo} ")
        card = ModelCard(text)
        if datasets:
            card.data.datasets = datasets
        card.data.tags = list(dict.fromkeys([*(card.data.get("tags") or []), *TAGS]))
    else:
        raise FastDraftError(f"{found.draft} has no {CARD}; `fastdraft card` makes one")
    data = card.data.to_dict()
    check_metadata(data)
    if not isinstance(data.get("base_model"), str):
        raise FastDraftError(
            f"{CARD}: base_model: the Hub must know whose draft this is; set card.base_model in "
            f"the recipe to the target's id, or write it in {path}"
        )
    return card


def push(
    plans: list[RepoPlan],
    *,
    private: bool = False,
    revision: str | None = None,
    overwrite: bool = False,
    message: str = "Draft made with fastdraft_hf",
) -> list[str]:
    """Send the plans' files, one commit a repository.

    Args:
        plans: of `plan_push`.
        private: make the repositories private; one that exists keeps its visibility.
        revision: the branch, made if it is not there; by default ``main``.
        overwrite: also write into a repository that holds something else.
        message: the commit's.

    Returns:
        the repositories' pages.

    Raises:
        FastDraftError: no token or a wrong one, a name that holds something else, or the Hub is out
            of reach; the same call goes on where it was.
    """
    from huggingface_hub import HfApi, get_token

    token = get_token()
    if token is None:
        raise FastDraftError("push: no token: run `hf auth login`, or set HF_TOKEN")
    for plan in plans:
        check_files(plan.files, token)
    api = HfApi(library_name="fastdraft_hf")
    with hub_errors("push", plans[-1].repo):
        limit_waiting()
        api.whoami(token=token)
        # Every name is looked at before anything is sent anywhere.
        there = [_check_name(api, plan, overwrite) for plan in plans]
    pages = []
    for plan, exists in zip(plans, there, strict=True):
        with hub_errors("push", plan.repo, after="what was sent is not sent again"):
            pages.append(_send(api, plan, exists, private, revision, overwrite, message))
    return pages


def _check_name(api: HfApi, plan: RepoPlan, overwrite: bool) -> bool:
    """Return whether the repository exists; refuse one that holds something else."""
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        info = api.repo_info(plan.repo, repo_type=plan.repo_type)
    except RepositoryNotFoundError:
        return False
    names = {s.rfilename for s in info.siblings or []} - {_OF_THE_HUB}
    if not names or overwrite:
        return True
    card = info.card_data
    if "fastdraft" not in ((card.get("tags") if card else None) or []):
        raise FastDraftError(
            f"push: {plan.repo} exists and was not made by fastdraft_hf; choose another name, or "
            "replace all it holds with --overwrite"
        )
    base_model = card.get("base_model") if card else None
    if plan.repo_type == "model" and base_model not in (None, plan.base_model):
        raise FastDraftError(
            f"push: {plan.repo} is a draft for {base_model}, not for {plan.base_model}; choose "
            "another name, or replace it with --overwrite"
        )
    return True


def _send(
    api: HfApi,
    plan: RepoPlan,
    exists: bool,
    private: bool,
    revision: str | None,
    overwrite: bool,
    message: str,
) -> str:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    kind = plan.repo_type
    if not exists:
        api.create_repo(plan.repo, repo_type=kind, private=private, exist_ok=True)
    if revision not in (None, "main"):
        api.create_branch(plan.repo, branch=str(revision), repo_type=kind, exist_ok=True)
    info = api.repo_info(plan.repo, repo_type=kind, revision=revision)
    wanted = {file.path for file in plan.files}
    stale = [
        s.rfilename
        for s in info.siblings or []
        if s.rfilename not in wanted and _goes(s.rfilename, kind, overwrite)
    ]
    operations: list[Any] = [CommitOperationDelete(name) for name in stale]
    for file in plan.files:
        operations.append(CommitOperationAdd(file.path, file.content))
    logger.info("%s: %d files, %.1f MB", plan.repo, len(plan.files), plan.size / 1e6)
    commit = api.create_commit(
        plan.repo,
        operations,
        commit_message=message,
        repo_type=kind,
        revision=revision,
        parent_commit=info.sha,
    )
    logger.info("%s: commit %s", plan.repo, commit.oid)
    return f"{api.endpoint}/{'datasets/' if kind == 'dataset' else ''}{plan.repo}"


def _goes(name: str, kind: str, overwrite: bool) -> bool:
    if name == _OF_THE_HUB:
        return False
    # A pattern without a slash is of the top folder only.
    return overwrite or any(
        fnmatch.fnmatch(name, pattern) and name.count("/") == pattern.count("/")
        for pattern in _MANAGED[kind]
    )
