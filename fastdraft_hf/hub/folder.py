"""What a draft's repository holds, gathered from a run's folder or a draft's."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from fastdraft_hf._atomic import publish_folder, sha256_file, write_json
from fastdraft_hf._card import (
    CARD,
    PROVENANCE,
    TAGS,
    check_metadata,
    check_texts,
    draft_files,
    is_model_id,
    load_card,
)
from fastdraft_hf._errors import FastDraftError, redacted
from fastdraft_hf.decode.settings import read_draft_tokens
from fastdraft_hf.hub.card import render_card
from fastdraft_hf.hub.run_folder import RunFolder, find_run

# What optimum-intel writes. Its .bin files hold numbers only.
_OPENVINO_FILES = ("*.xml", "*.bin", "*.json", "*.jinja", "*.txt", "*.model")
_ABSOLUTE_PATH = re.compile(r"(?<![\w/.:>-])(?:~?/|[A-Za-z]:\\)(?:[^\s/\\\"'=,]+[/\\])+")
# Keys of configs that say where a model came from on this machine.
_PRIVATE_KEYS = ("_name_or_path", "name_or_path", "_model_name_or_path")
# fastdraft_hf is not listed: without it the folder still works.
_REQUIREMENTS = """\
transformers>=5.5
# fastdraft-hf: optional; with it the faster loop is used, and batches larger than one
"""


def write_custom_generate(folder: Path) -> None:
    """Write the ``custom_generate/`` folder of a draft's repository.

    With it, ``target.generate(custom_generate="the/repository", assistant_model=draft,
    trust_remote_code=True)`` decodes through `fastdraft_hf.assisted_decoding`.
    """
    code = folder / "custom_generate"
    code.mkdir(exist_ok=True)
    shutil.copyfile(Path(__file__).with_name("pushed_generate.py"), code / "generate.py")
    (code / "requirements.txt").write_text(_REQUIREMENTS, encoding="utf-8")


def gather(
    folder: Path, repo_id: str, output: Path, *, openvino: bool = False, dtype: str | None = None
) -> None:
    """Write the files of a draft's repository to a folder; the Hub is not reached.

    Args:
        folder: a run's folder, or a draft's.
        repo_id: the draft's repository, ``user/name``; the card loads the draft from it.
        output: an empty folder.
        openvino: add the draft's OpenVINO folders, each under its name.
        dtype: store the weights in this type, such as ``bfloat16``; ``None`` keeps theirs.

    Raises:
        FastDraftError: something is missing or not fit to be published; the file is named.
    """
    from huggingface_hub import get_token

    if not is_model_id(repo_id, owner=True):
        raise FastDraftError(f"--repo-id: '{repo_id}' is not a repository id such as user/name")
    found = find_run(folder)
    draft = found.draft
    if read_draft_tokens(draft) is None:
        raise FastDraftError(
            f"{draft}: generation_config.json has no num_assistant_tokens, so transformers would "
            "draft 20 tokens per round; set it, such as to 3"
        )
    files = draft_files(draft)
    if not any(name.endswith(".safetensors") for name in files):
        raise FastDraftError(f"{draft} holds no .safetensors weights; nothing else is pushed")
    for name in ("config.json", "tokenizer_config.json"):
        if name not in files:
            raise FastDraftError(f"{draft} holds no {name}")
    exported = found.openvino_folders() if openvino else []
    if openvino and not exported:
        raise FastDraftError(f"--openvino: {draft} has no OpenVINO folder")
    for one in exported:
        if one.is_symlink():
            raise FastDraftError(f"{one} is a symbolic link; only regular files are pushed")
        found_here = draft_files(one, _OPENVINO_FILES)
        files |= {f"{one.name}/{name}": file for name, file in found_here.items()}
    for name, file in files.items():
        (output / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(file, output / name)
    types = cast_weights(output, dtype) if dtype else [dtype]
    for name in ("config.json", "tokenizer_config.json"):
        config = json.loads((output / name).read_text(encoding="utf-8"))
        for key in _PRIVATE_KEYS:
            config.pop(key, None)
        if config.get("use_cache") is False:  # a trainer's setting; a draft without it is slow
            config["use_cache"] = True
        write_json(output / name, config)
    write_custom_generate(output)
    stages, note = found.records, ""
    if types != [dtype]:
        note = (
            f"The weights are stored in {dtype}; the figures below were measured with "
            f"{' and '.join(map(str, types))}."
        )
        facts = {"dtype": dtype, "cast_from": types, "note": note}
        stages = {**stages, "push": {"stage": "push", "facts": facts}}
    card = _card(found, repo_id, exported[0].name if exported else None, note)
    (output / CARD).write_text(card, encoding="utf-8")
    if stages:
        write_json(output / PROVENANCE, _public(stages))
    check_texts(files_below(output), get_token())


def files_below(folder: Path) -> dict[str, Path]:
    """Return the files of a folder and its folders by their paths in it."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {file.relative_to(folder).as_posix(): file for file in files}


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


def cast_weights(folder: Path, dtype: str) -> list[str]:
    """Store a checkpoint's floating-point weights in another type, in place.

    The files' tensors are cast one by one, so tied and unused ones stay; integers are not touched.

    Args:
        folder: the checkpoint's folder.
        dtype: a floating-point type of PyTorch, such as ``bfloat16``.

    Returns:
        the types that the weights had, such as ``["float32"]``.

    Raises:
        FastDraftError: a weight is not finite in the new type.
    """
    import torch
    from safetensors.torch import load, save_file

    types, size = set(), 0
    for file in folder.glob("*.safetensors"):
        tensors = load(file.read_bytes())  # not mapped from the file that is replaced below
        for key, tensor in tensors.items():
            if tensor.is_floating_point():
                types.add(str(tensor.dtype).removeprefix("torch."))
                tensors[key] = tensor.to(getattr(torch, dtype)).contiguous()
                if not bool(torch.isfinite(tensors[key]).all()):
                    raise FastDraftError(f"{file.name}: {key} is not finite in {dtype}; not pushed")
            size += tensors[key].nbytes
        save_file(tensors, file, metadata={"format": "pt"})
    for file in (folder / "config.json", *folder.glob("*.safetensors.index.json")):
        content = json.loads(file.read_text(encoding="utf-8"))
        if file.name == "config.json":
            content.pop("torch_dtype", None)  # the key's older name
            content["dtype"] = dtype
        else:
            content["metadata"] = {**content.get("metadata", {}), "total_size": size}
        write_json(file, content)
    return sorted(types)


def replace_folder(new: Path, folder: Path) -> None:
    """Move a finished folder to ``folder``; replace the old one.

    A kill at any time leaves one of the two, or the old one as ``.NAME.old``.
    """
    old = folder.with_name(f".{folder.name}.old")
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.rename(folder, old)
    publish_folder(new, folder)
    shutil.rmtree(old, ignore_errors=True)
