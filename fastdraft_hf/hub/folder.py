"""What a draft's repository holds, gathered from a run's folder or a draft's."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from fastdraft_hf._atomic import publish_folder, sha256_file
from fastdraft_hf._card import CARD, PROVENANCE, TAGS, Files, draft_files, load_card
from fastdraft_hf._errors import FastDraftError, redacted
from fastdraft_hf._metadata import check_metadata
from fastdraft_hf.hub.card import render_card
from fastdraft_hf.hub.run_folder import RunFolder

# What optimum-intel writes. Its .bin files hold numbers only.
_OPENVINO_FILES = ("*.xml", "*.bin", "*.json", "*.jinja", "*.txt", "*.model")
_ABSOLUTE_PATH = re.compile(r"(?<![\w/.:>-])(?:~?/|[A-Za-z]:\\)(?:[^\s/\\\"'=,]+[/\\])+")
# Keys of configs that say where a model came from on this machine.
_PRIVATE_KEYS = ("_name_or_path", "name_or_path", "_model_name_or_path")
# fastdraft_hf is not listed: without it the folder still works.
_REQUIREMENTS = b"""\
transformers>=5.5
# fastdraft-hf: optional; with it the faster loop is used, and batches larger than one
"""


def custom_generate_files() -> dict[str, bytes]:
    """Return the ``custom_generate/`` folder of a draft's repository.

    With it, ``target.generate(custom_generate="the/repository", assistant_model=draft,
    trust_remote_code=True)`` decodes through `fastdraft_hf.assisted_decoding`.
    """
    return {
        "custom_generate/generate.py": Path(__file__).with_name("pushed_generate.py").read_bytes(),
        "custom_generate/requirements.txt": _REQUIREMENTS,
    }


def write_custom_generate(folder: Path) -> None:
    """Write the same files into a draft's folder."""
    (folder / "custom_generate").mkdir(exist_ok=True)
    for name, content in custom_generate_files().items():
        (folder / name).write_bytes(content)


def repository_files(
    found: RunFolder,
    location: str,
    *,
    cast: Path | None = None,
    openvino: bool = False,
    weights_note: str = "",
    records: dict[str, Any] | None = None,
) -> Files:
    """Return the files of a draft's repository.

    Args:
        found: the draft and its run.
        location: what the card's snippets load the draft from.
        cast: a folder of `cast_weights`; its files take the place of the draft's own.
        openvino: add the draft's OpenVINO folders, each under its name.
        weights_note: for the card.
        records: put beside the stages' records in ``provenance.json``.

    Raises:
        FastDraftError: something is missing or not fit to be published; the file is named.
    """
    draft = found.draft
    files: Files = {**draft_files(draft)}
    if not any(name.endswith(".safetensors") for name in files):
        raise FastDraftError(f"{draft} holds no .safetensors weights; nothing else is pushed")
    for name in ("config.json", "tokenizer_config.json"):
        if name not in files:
            raise FastDraftError(f"{draft} holds no {name}")
    if cast is not None:
        files |= {file.name: file for file in cast.iterdir()}
    for name in ("config.json", "tokenizer_config.json"):
        files[name] = _public_config(files[name])
    files |= custom_generate_files()
    exported = found.openvino_folders() if openvino else []
    if openvino and not exported:
        raise FastDraftError(f"--openvino: {draft} has no OpenVINO folder")
    for folder in exported:
        if folder.is_symlink():
            raise FastDraftError(f"{folder} is a symbolic link; only regular files are pushed")
        for name, file in draft_files(folder, _OPENVINO_FILES).items():
            files[f"{folder.name}/{name}"] = file
    first = exported[0].name if exported else None
    files[CARD] = _card(found, location, first, weights_note).encode()
    stages = {**found.records, **(records or {})}
    if stages:
        text = json.dumps(_public(stages), indent=2, ensure_ascii=False)
        files[PROVENANCE] = f"{text}\n".encode()
    return files


def _public_config(file: Path | bytes) -> bytes:
    config = json.loads(file if isinstance(file, bytes) else file.read_bytes())
    for key in _PRIVATE_KEYS:
        config.pop(key, None)
    if config.get("use_cache") is False:  # a trainer's setting; a draft without a cache is slow
        config["use_cache"] = True
    return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()


def _public(value: Any) -> Any:
    """Return a record without credentials, absolute paths cut to their last part."""
    if isinstance(value, dict):
        return {key: _public(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_public(one) for one in value]
    return _ABSOLUTE_PATH.sub("", redacted(value)) if isinstance(value, str) else value


def _card(found: RunFolder, location: str, openvino: str | None, weights_note: str) -> str:
    """Return the card for a repository: rendered again, unless somebody edited it."""
    path = found.draft / CARD
    record = found.records.get("card", {})
    facts = record.get("facts", {})
    edited = path.is_file() and facts.get("card_sha256") != sha256_file(path)
    if found.summary.evaluation is not None and facts and not edited:
        facts = {**facts, **{key: record.get(key) for key in ("target", "target_revision")}}
        card = render_card(
            found.summary,
            facts,
            draft_location=location,
            openvino=openvino,
            weights_note=weights_note,
        )
        return str(card.content)
    if not path.is_file():
        raise FastDraftError(f"{found.draft} has no {CARD}; write one, or finish the run")
    text = path.read_text(encoding="utf-8")
    # The snippet of every card names what it loads the draft from.
    for old in set(re.findall(r'^draft = \w+\.from_pretrained\("([^"\n]+)"', text, re.MULTILINE)):
        text = re.sub(rf'(?<=[" ]){re.escape(old)}(?=[" /])', lambda _: location, text)
    card = load_card(text)
    card.data.tags = list(dict.fromkeys([*(card.data.get("tags") or []), *TAGS]))
    check_metadata(card.data.to_dict())
    if not isinstance(card.data.get("base_model"), str):
        raise FastDraftError(
            f"{path}: base_model: the Hub must know whose draft this is; set card.base_model in "
            "the recipe to the target's id, or write it in this file"
        )
    return str(card.content)


def cast_weights(draft: Path, output: Path, dtype: str) -> list[str]:
    """Write a checkpoint's weights in another type; ``config.json`` then names it.

    The files' tensors are cast one by one, so tied and unused ones stay; integers are not touched.

    Args:
        draft: the checkpoint's folder.
        output: an empty folder.
        dtype: a floating-point type of PyTorch, such as ``bfloat16``.

    Returns:
        the types that the weights had, such as ``["float32"]``.

    Raises:
        FastDraftError: a weight is not finite in the new type.
    """
    import torch
    from safetensors.torch import load_file, save_file

    types = set()
    files = draft_files(draft)
    for name, file in files.items():
        if not name.endswith(".safetensors"):
            continue
        tensors = load_file(file)
        for key, tensor in tensors.items():
            if tensor.is_floating_point():
                types.add(str(tensor.dtype).removeprefix("torch."))
                tensors[key] = tensor.to(getattr(torch, dtype)).contiguous()
                if not bool(torch.isfinite(tensors[key]).all()):
                    raise FastDraftError(f"{file}: {key} is not finite in {dtype}; not pushed")
        save_file(tensors, output / name, metadata={"format": "pt"})
    size = sum(file.stat().st_size for file in output.iterdir())
    for name in files:
        if name == "config.json" or name.endswith(".safetensors.index.json"):
            content = json.loads((draft / name).read_text(encoding="utf-8"))
            if name == "config.json":
                content.pop("torch_dtype", None)  # the key's older name
                content["dtype"] = dtype
            else:
                content["metadata"] = {**content.get("metadata", {}), "total_size": size}
            (output / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return sorted(types)


def write_folder(files: Files, folder: Path) -> None:
    """Write files as a folder that appears complete or not at all; replace the old one.

    An old folder is moved aside before and deleted last: a kill at any time leaves one of the two,
    or the old one as ``.NAME.old``.
    """
    partial, old = (folder.with_name(f".{folder.name}.{word}") for word in ("partial", "old"))
    shutil.rmtree(partial, ignore_errors=True)  # of a killed run
    for path, content in files.items():
        (partial / path).parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            (partial / path).write_bytes(content)
        else:
            shutil.copyfile(content, partial / path)
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.rename(folder, old)
    publish_folder(partial, folder)
    shutil.rmtree(old, ignore_errors=True)
