"""A draft's repository as a folder of this machine: what a push would send, in bfloat16."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastdraft_hf._atomic import publish_folder
from fastdraft_hf._errors import FastDraftError
from fastdraft_hf.hub.files import RepoFile

DTYPE = "bfloat16"
_SUFFIX = ".safetensors"


def cast_draft(draft: Path, output: Path) -> list[str]:
    """Copy a checkpoint, its weights rounded to bfloat16.

    The tensors are those of the files, one by one, so that tied and unused ones stay as they are;
    integers are not touched. ``config.json`` says the new type, which ``from_pretrained`` then
    loads.

    Args:
        draft: the checkpoint's folder.
        output: an empty folder. Files that do not depend on the type are not copied.

    Returns:
        the types that weights had before, such as ``["float32"]``.

    Raises:
        FastDraftError: there are no safetensors weights, or a weight is not finite.
    """
    import torch
    from safetensors.torch import load_file, save_file

    files = sorted(draft.glob(f"*{_SUFFIX}"))
    if not files:
        raise FastDraftError(f"{draft} holds no .safetensors weights")
    types = set()
    for file in files:
        tensors = load_file(file)
        for name, tensor in tensors.items():
            if not tensor.is_floating_point():
                continue
            types.add(str(tensor.dtype).removeprefix("torch."))
            if not bool(torch.isfinite(tensor).all()):
                raise FastDraftError(f"{file}: {name} is not finite; such a draft is not shipped")
            tensors[name] = tensor.to(torch.bfloat16).contiguous()
        save_file(tensors, output / file.name, metadata={"format": "pt"})
    for index in draft.glob(f"*{_SUFFIX}.index.json"):
        content = json.loads(index.read_text(encoding="utf-8"))
        size = sum(f.stat().st_size for f in output.glob(f"*{_SUFFIX}"))
        content["metadata"] = {**content.get("metadata", {}), "total_size": size}
        _write(output / index.name, content)
    config = json.loads((draft / "config.json").read_text(encoding="utf-8"))
    config.pop("torch_dtype", None)  # the key's older name
    _write(output / "config.json", {**config, "dtype": DTYPE})
    return sorted(types)


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def weights_size(files: Sequence[RepoFile]) -> int:
    """Return the bytes of the weights among some files of a plan."""
    return sum(f.size for f in files if f.path.endswith(_SUFFIX) and "/" not in f.path)


def write_files(files: Sequence[RepoFile], folder: Path, *, overwrite: bool) -> None:
    """Write the files of a plan as a folder that appears whole or not at all.

    Args:
        files: of `fastdraft_hf.hub.push.RepoPlan`.
        folder: where to.
        overwrite: replace a folder of that name. The old one is moved aside first and deleted
            last, so that a kill at any time leaves one of the two; the next call puts an old one
            back that was only moved.

    Raises:
        FastDraftError: the folder exists and is not to be replaced.
    """
    partial, aside = (folder.with_name(f".{folder.name}.{word}") for word in ("partial", "old"))
    check_free(folder, overwrite=overwrite)
    shutil.rmtree(partial, ignore_errors=True)  # of a killed run
    partial.mkdir(parents=True)
    for file in files:
        path = partial / file.path
        path.parent.mkdir(exist_ok=True)
        if isinstance(file.content, bytes):
            path.write_bytes(file.content)
        else:
            shutil.copyfile(file.content, path)
    if folder.exists():
        os.rename(folder, aside)
    publish_folder(partial, folder)
    shutil.rmtree(aside, ignore_errors=True)


def check_free(folder: Path, *, overwrite: bool) -> None:
    """Undo or finish a replacement that was killed half-way; then refuse one not asked for.

    Raises:
        FastDraftError: the folder exists, and ``overwrite`` is not set.
    """
    _put_back(folder)
    if folder.exists() and not overwrite:
        raise FastDraftError(f"{folder} exists; replace it with --overwrite, or give another --to")


def _put_back(folder: Path) -> None:
    aside = folder.with_name(f".{folder.name}.old")
    if aside.exists() and not folder.exists():
        os.rename(aside, folder)
    elif aside.exists():
        shutil.rmtree(aside)
