"""A draft's repository: which files it holds, and the metadata of its card."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastdraft_hf._errors import FastDraftError, holds_secret, nearest

if TYPE_CHECKING:
    from huggingface_hub import ModelCard

CARD, PROVENANCE = "README.md", "provenance.json"
# A checkpoint and its tokenizer. Weights are safetensors only: loading a pickle runs code.
DRAFT_FILES = (
    "*.safetensors",
    "*.safetensors.index.json",
    "config.json",
    "generation_config.json",
    "tokenizer*.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "reduced_vocabulary.json",
    "LICENSE*",
    "NOTICE*",
)
TAGS = ["fastdraft", "speculative-decoding", "draft-model", "assisted-generation"]

_BINARIES = {".safetensors", ".bin", ".model"}
_LOCAL_PATH = re.compile(
    r"(?<![\w/.:>-])(?:/(?:home|root|Users|tmp|work|mnt|data|scratch)/|[A-Z]:\\)[^\s\"'`)]+"
)

# huggingface.co/docs/hub, "Licenses".
_NAMES = """
    apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0
    bigcode-openrail-m afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause
    bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0
    cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0
    cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0
    cdla-permissive-1.0 cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1
    eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 isc h-research intel-research
    lppl-1.3c ms-pl apple-ascl apple-amlr mpl-2.0 odc-by odbl openmdw-1.0 openrail++ osl-3.0
    postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr deepfloyd-if-license
    fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2 llama3.3 llama4
    grok2-community gemma unknown other
"""
LICENSES = frozenset(_NAMES.split())


def draft_files(folder: Path, patterns: Sequence[str] = DRAFT_FILES) -> dict[str, Path]:
    """Return a folder's files of the kinds that a draft has.

    Raises:
        FastDraftError: the folder holds a symbolic link, which could lead to any file of this
            machine.
    """
    for file in sorted(folder.iterdir()):
        if file.is_symlink():
            raise FastDraftError(f"{file} is a symbolic link; only regular files are pushed")
    found = sorted({file for pattern in patterns for file in folder.glob(pattern)})
    return {file.name: file for file in found if file.is_file()}


def check_texts(files: Mapping[str, Path], token: str | None) -> None:
    """Refuse a credential in a text file, and a path of this machine in the card.

    Raises:
        FastDraftError: naming the file.
    """
    for path, content in files.items():
        if Path(path).suffix in _BINARIES:
            continue
        text = content.read_text(encoding="utf-8", errors="replace")
        if holds_secret(text, token):
            raise FastDraftError(
                f"{path} holds what looks like a token or password; nothing is pushed"
            )
        local = _LOCAL_PATH.search(text) if path == CARD else None
        if local is not None:
            raise FastDraftError(
                f"{path} names a path of this machine, {local.group()}; write what others should "
                "read there"
            )


def load_card(text: str) -> ModelCard:
    """Parse a model card.

    Raises:
        FastDraftError: its metadata is not YAML, or has a license, language, tag or model index
            that the Hub refuses.
    """
    import yaml
    from huggingface_hub import ModelCard

    try:
        card = ModelCard(text)
    except (ValueError, TypeError, AttributeError, yaml.YAMLError) as error:
        raise FastDraftError(f"{CARD}: metadata: {' '.join(str(error).split())[:200]}") from None
    found = {key: getattr(card.data, key) or [] for key in ("license", "language", "tags")}
    given = {key: one if isinstance(one, list) else [one] for key, one in found.items()}
    for license in given["license"]:
        check_license(str(license), f"{CARD}: license")
    check_languages(list(map(str, given["language"])), f"{CARD}: language")
    if not all(isinstance(tag, str) for tag in given["tags"]):
        raise FastDraftError(f"{CARD}: tags: expected texts, got {given['tags']}")
    return card


def python(text: str) -> str:
    """Return a name as a Python string literal on one line."""
    return json.dumps(text, ensure_ascii=False)


def markdown(text: str) -> str:
    """Return a name as Markdown text: no HTML, link, code or table cell can start in it."""
    return re.sub(r"([\\`*<>|\[\]])", r"\\\1", " ".join(text.split()))


def check_license(license: str, where: str) -> None:
    """Raise `FastDraftError` for a license identifier that is not on the Hub's list."""
    if license not in LICENSES:
        hint = nearest(license, LICENSES) or "; use `other` for a license that is not on its list"
        raise FastDraftError(f"{where}: the Hub has no license '{license}'{hint}")


def check_languages(languages: Sequence[str], where: str) -> None:
    """Raise `FastDraftError` for a language that is not an ISO 639 code of 2 or 3 letters."""
    for language in languages:
        if not re.fullmatch("[a-z]{2,3}|code|multilingual", language):
            raise FastDraftError(
                f"{where}: '{language}' is not a language code (two or three letters, such as en)"
            )


def is_model_id(name: Any, *, owner: bool = False) -> bool:
    """Return whether ``name`` can be a repository on the Hub; ``owner``: as ``user/name`` only."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return isinstance(name, str) and ("/" in name or not owner)


def check_model_id(name: Any, where: str) -> None:
    """Raise `FastDraftError` for a ``name`` that cannot be a repository on the Hub."""
    if not is_model_id(name):
        raise FastDraftError(f"{where}: {name!r} is not a repository id such as user/name")
