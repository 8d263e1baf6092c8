"""A draft's repository: which files it holds, and its model card."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastdraft_hf import _metadata
from fastdraft_hf._errors import FastDraftError, holds_token

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCard

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

# Paths in a repository to their content on this machine.
Files = dict[str, Path | bytes]

_TEXTS = {".md", ".json", ".txt", ".jinja", ".py", ""}
_LOCAL_PATH = re.compile(
    r"(?<![\w/.:>-])(?:/(?:home|root|Users|tmp|work|mnt|data|scratch)/|[A-Z]:\\)[^\s\"'`)]+"
)


def draft_files(folder: Path, patterns: Sequence[str] = DRAFT_FILES) -> dict[str, Path]:
    """Return a folder's files of the kinds that a draft has.

    Raises:
        FastDraftError: one is a symbolic link, which could lead to any file of this machine.
    """
    found = sorted({file for pattern in patterns for file in folder.glob(pattern)})
    for file in found:
        if file.is_symlink():
            raise FastDraftError(f"{file} is a symbolic link; only regular files are pushed")
    return {file.name: file for file in found if file.is_file()}


def check_texts(files: Mapping[str, Path | bytes], token: str | None) -> None:
    """Refuse a credential in a text file, and a path of this machine in the card.

    Raises:
        FastDraftError: naming the file.
    """
    for path, content in files.items():
        if Path(path).suffix not in _TEXTS:
            continue
        text = (content if isinstance(content, bytes) else content.read_bytes()).decode(
            "utf-8", errors="replace"
        )
        if holds_token(text, token):
            raise FastDraftError(f"{path} holds what looks like a token; nothing is pushed")
        local = _LOCAL_PATH.search(text) if path == CARD else None
        if local is not None:
            raise FastDraftError(
                f"{path} names a path of this machine, {local.group()}; write what others should "
                "read there"
            )


def load_card(text: str) -> ModelCard:
    """Parse a model card.

    Raises:
        FastDraftError: its metadata is not YAML, or has a model index that the Hub cannot read.
    """
    import yaml
    from huggingface_hub import ModelCard

    try:
        return ModelCard(text)
    except (ValueError, TypeError, AttributeError, yaml.YAMLError) as error:
        raise FastDraftError(f"{CARD}: metadata: {' '.join(str(error).split())[:200]}") from None


def fill_card(
    *,
    model_name: str,
    target_name: str,
    draft_location: str,
    num_assistant_tokens: int,
    license: str | None = None,
    base_model: str | None = None,
    datasets: Sequence[str] = (),
    language: Sequence[str] = (),
    tags: Sequence[str] = (),
    eval_results: Sequence[EvalResult] = (),
    **fields: Any,
) -> ModelCard:
    """Fill the card's template; parts without their fields are left out.

    Args:
        model_name: the heading.
        target_name: the target's model id, or the name of its folder.
        draft_location: what the snippets load the draft from.
        num_assistant_tokens: γ for the snippets of servers.
        license: license identifier. One that the Hub does not know becomes ``other`` with a link to
            the target's page.
        base_model: the target's id on the Hub; by default ``target_name``.
        datasets: ids of the datasets it was trained on.
        language: language codes.
        tags: further tags.
        eval_results: the model index.
        **fields: what the template reads besides.

    Raises:
        FastDraftError: a name holds a line break or another control character, or the metadata
            breaks a rule of the Hub.
    """
    from huggingface_hub import ModelCard, ModelCardData

    target = base_model or target_name
    names = {"model_name": model_name, "target": target, "draft": draft_location}
    for what, name in names.items():
        if not name.isprintable():
            raise FastDraftError(f"{CARD}: {what}: {name!r} holds a control character; rename it")
    is_id = _metadata.is_model_id(target, owner=True)
    listed = license if license is None or license in _metadata.LICENSES else "other"
    # No `base_model_relation`: the Hub knows finetune, adapter, quantized and merge, and a draft is
    # none of them.
    data = ModelCardData(
        model_name=model_name,
        # A folder's name is not an id: the Hub would link to another model, or to none.
        base_model=target if is_id else None,
        license=listed,
        datasets=list(datasets) or None,
        language=list(language) or None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=list(dict.fromkeys([*TAGS, *tags])),
        eval_results=list(eval_results) or None,
    )
    if listed == "other":
        own = license if license != "other" else f"{target.split('/')[-1].lower()}-license"
        data.license_name = re.sub(r"[^a-z0-9.-]+", "-", str(own).lower())
        data.license_link = f"https://huggingface.co/{target}" if is_id else "LICENSE"
    _metadata.check_metadata(data.to_dict())
    speculative = {
        "method": "draft_model",
        "model": draft_location,
        "num_speculative_tokens": num_assistant_tokens,
    }
    return ModelCard.from_template(
        data,
        template_str=template_path().read_text(encoding="utf-8"),
        heading=markdown(model_name),
        target_link=f"[{target}](https://huggingface.co/{target})" if is_id else markdown(target),
        target_python=python(target),
        draft_python=python(draft_location),
        target_shell=shlex.quote(target),
        draft_shell=shlex.quote(draft_location),
        speculative_config=shlex.quote(json.dumps(speculative, ensure_ascii=False)),
        license_line=f"{license}." if license else "Follows the target's license.",
        num_assistant_tokens=num_assistant_tokens,
        **fields,
    )


def template_path() -> Path:
    """Return the card's template: packaged in ``hub/``, or in the checkout's model_cards/."""
    packaged = Path(__file__).parent / "hub" / "template.md"
    if packaged.exists():
        return packaged
    return Path(__file__).resolve().parents[1] / "model_cards" / "template.md"


def python(text: str) -> str:
    """Return a name as a Python string literal on one line."""
    return json.dumps(text, ensure_ascii=False)


def markdown(text: str) -> str:
    """Return a name as Markdown text: no HTML, link, code or table cell can start in it."""
    return re.sub(r"([\\`*<>|\[\]])", r"\\\1", " ".join(text.split()))
