"""A Hugging Face checkpoint as OpenVINO IR, with its tokenizer, through optimum-intel."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Literal

from fastdraft_hf._atomic import atomic_folder
from fastdraft_hf._errors import FastDraftError
from fastdraft_hf._extras import openvino_available
from fastdraft_hf._paths import cache_dir
from fastdraft_hf.draft.reduced_vocabulary import read_reduced_vocabulary, write_reduced_vocabulary
from fastdraft_hf.export.reduced_vocabulary import reduce_openvino

WeightFormat = Literal["fp32", "fp16", "int8", "int4"]


def require_openvino() -> None:
    """Raise `FastDraftError` when the ``openvino`` extra is missing."""
    if not openvino_available():
        raise FastDraftError("OpenVINO is not installed; `pip install fastdraft_hf[openvino]`")


def export_openvino(model: Path, output: Path, weight_format: WeightFormat) -> None:
    """Write ``model`` as OpenVINO IR to ``output``, which appears when it is whole.

    A draft with a reduced vocabulary keeps it here (`fastdraft_hf.draft.reduced_vocabulary`); its
    logits are of full size all the same.

    optimum-intel's own command does the work, in a process of its own: its memory goes back when
    it ends, and its tracing warnings stay out of the log.

    Args:
        model: a folder that ``from_pretrained`` reads.
        output: the folder to make; it must not exist.
        weight_format: how weights are stored; int8 and int4 are weight-only compression (NNCF).

    Raises:
        FastDraftError: OpenVINO is missing, or the export fails (its last lines are quoted).
    """
    require_openvino()
    head = read_reduced_vocabulary(model)
    with atomic_folder(output) as temporary:
        command = [sys.executable, "-m", "optimum.commands.optimum_cli", "export", "openvino"]
        command += ["--model", str(model), "--task", "text-generation-with-past"]
        command += ["--weight-format", weight_format]
        if weight_format == "int4" and (size := _group_size(model)) is not None:
            command += ["--group-size", str(size)]
        command.append(str(temporary))
        result = subprocess.run(
            command,
            capture_output=True,
            text=True,
            # The model lies on disk: without this, optimum asks the Hub about it.
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )
        if result.returncode != 0 or not (temporary / "openvino_model.xml").exists():
            tail = "\n".join((result.stderr or result.stdout).strip().splitlines()[-5:])
            raise FastDraftError(f"OpenVINO export of {model} failed:\n{tail}")
        if head is not None:
            reduce_openvino(temporary, head.token_ids)
            write_reduced_vocabulary(temporary, head)


def _group_size(model: Path) -> int | None:
    """Return the weights that share a scale in int4, where NNCF's 128 does not go into the widths.

    A draft's widths are seldom multiples of 128, and NNCF then refuses the model. (Its fallback to
    smaller groups is not passed on by optimum-intel 2.1.) ``None`` leaves the choice to them.
    """
    path = model / "config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    heads, width = config.get("num_attention_heads"), config.get("hidden_size")
    if not heads or not width:
        return None
    widths = [width, heads * (config.get("head_dim") or width // heads)]
    widths.append(config.get("intermediate_size") or width)
    fitting = [size for size in (128, 64, 32) if not any(w % size for w in widths)]
    if fitting[:1] == [128]:
        return None
    return fitting[0] if fitting else -1  # -1: one scale a column


def cache_folder(model: Path, weight_format: WeightFormat) -> Path:
    """Return where a model's IR is cached; it exists once it has been made."""
    facts = [str(model.resolve())]
    for file in sorted(model.iterdir()):
        if file.suffix in (".safetensors", ".json"):
            status = file.stat()
            facts.append(f"{file.name} {status.st_size} {status.st_mtime_ns}")
    key = hashlib.sha256("\n".join(facts).encode()).hexdigest()[:16]
    return cache_dir("openvino") / f"{model.name}-{key}-{weight_format}"


def cached_openvino(model: Path, weight_format: WeightFormat) -> Path:
    """Return the IR of a model that does not change (a target), exporting it once per machine."""
    folder = cache_folder(model, weight_format)
    if not folder.exists():
        try:
            export_openvino(model, folder, weight_format)
        except OSError:
            if not folder.exists():  # another process may have finished the same export first
                raise
    return folder
