"""From what a user writes after ``target:`` to a folder on this machine."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path

from fastdraft_hf._errors import FastDraftError, nearest
from fastdraft_hf.target.embedded import EMBEDDED_ID, embedded_target

logger = logging.getLogger(__name__)

# `embedded:NAME` always takes the packaged copy, so that a recipe gives the same model with and
# without the Hub in reach.
EMBEDDED_NAMES = {"embedded:smollm2-135m-instruct": embedded_target}

# Weights, tokenizer and configs; never pickles, never code.
_PATTERNS = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "LICENSE*", "README.md"]


@dataclass(frozen=True)
class Target:
    """A target that lies on this machine.

    Attributes:
        path: its folder, readable by ``from_pretrained``.
        name: the Hub id when known, else the folder's name; goes into cards and provenance.
        revision: the Hub commit or the packaged file's sha256, when known.
        license: the license identifier the model declares, when known.
    """

    path: Path
    name: str
    revision: str | None = None
    license: str | None = None


def resolve_target(target: str, revision: str | None = None, *, weights: bool = True) -> Target:
    """Find ``target``: a folder, ``embedded:NAME``, or a model id of the Hub.

    Args:
        target: what stands in the recipe.
        revision: a Hub branch, tag or commit.
        weights: whether its weights are needed. Without, a config (and tokenizer) will do, and
            only those are downloaded.

    Raises:
        FastDraftError: nothing of that name can be had, or it holds no safetensors weights.
    """
    if target.startswith("embedded:"):
        if target not in EMBEDDED_NAMES:
            hint = nearest(target, EMBEDDED_NAMES)
            raise FastDraftError(
                f"target: no embedded model '{target}'{hint}; known: {', '.join(EMBEDDED_NAMES)}"
            )
        return _describe(EMBEDDED_NAMES[target]())
    folder = Path(target).expanduser()
    if folder.is_dir():
        return _describe(folder, weights=weights)
    if target.startswith((".", "/", "~")) or target.count("/") > 1:
        raise FastDraftError(f"target: there is no folder {folder}")
    return _from_hub(target, revision, weights=weights)


def _describe(folder: Path, *, weights: bool = True) -> Target:
    if not (folder / "config.json").is_file():
        raise FastDraftError(f"target: {folder} holds no config.json, so it is no model folder")
    if weights and not any(folder.glob("*.safetensors")):
        raise FastDraftError(
            f"target: {folder} holds no .safetensors weights; pickled weights are not loaded. "
            "Convert them with `model.save_pretrained(folder)`."
        )
    source = folder / "fastdraft_source.json"
    if source.is_file():
        facts = json.loads(source.read_text(encoding="utf-8"))
        return Target(folder, facts["model_id"], f"sha256:{facts['sha256']}", facts["license"])
    return Target(folder, folder.resolve().name)


def _from_hub(model_id: str, revision: str | None, *, weights: bool = True) -> Target:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    patterns = _PATTERNS if weights else _PATTERNS[1:]
    try:
        path = Path(snapshot_download(model_id, revision=revision, allow_patterns=patterns))
    except HFValidationError as error:
        raise FastDraftError(f"target: '{model_id}' is neither a folder nor a model id") from error
    except GatedRepoError as error:
        raise FastDraftError(
            f"target: '{model_id}' is gated; accept its terms on its page and run `hf auth login`"
        ) from error
    except RevisionNotFoundError as error:
        raise FastDraftError(f"target: '{model_id}' has no revision '{revision}'") from error
    except RepositoryNotFoundError as error:
        raise FastDraftError(
            f"target: the Hub has no model '{model_id}' (or it is private: `hf auth login`)"
        ) from error
    except (LocalEntryNotFoundError, OSError) as error:
        if model_id == EMBEDDED_ID and revision is None:
            logger.warning("the Hub is out of reach: using the embedded copy of %s", EMBEDDED_ID)
            return _describe(embedded_target())
        raise FastDraftError(
            f"target: '{model_id}' is not on this machine and the Hub is out of reach; give a "
            f"folder, or use {', '.join(EMBEDDED_NAMES)}"
        ) from error
    found = _describe(path, weights=weights)
    # A snapshot's folder is named by its commit.
    return Target(path, model_id, path.name, _card_license(path) or found.license)


def _card_license(folder: Path) -> str | None:
    card = folder / "README.md"
    if not card.is_file():
        return None
    from huggingface_hub import ModelCard

    return getattr(ModelCard.load(card).data, "license", None)
