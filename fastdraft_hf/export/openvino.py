"""Export Hugging Face checkpoints to OpenVINO IR, with their tokenizers, through optimum-intel.

This module is also the program of the child process that runs optimum's exporter: its memory is
freed when it ends, its tracing warnings stay out of the log, and several small drafts share the
seconds that its imports take.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fastdraft_hf._atomic import atomic_folder, read_json
from fastdraft_hf._errors import FastDraftError
from fastdraft_hf.draft.reduced_vocabulary import (
    read_reduced_vocabulary,
    reduce_model,
    write_reduced_vocabulary,
)
from fastdraft_hf.target.packages import cache_dir
from fastdraft_hf.target.resolve import check_finite

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WeightFormat = Literal["fp32", "fp16", "int8", "int4"]

logger = logging.getLogger(__name__)

# Logit of a token that a reduced vocabulary leaves out: the lowest finite float16.
LOWEST = -65504.0

_TASK = "text-generation-with-past"


def openvino_available() -> bool:
    """Return whether the ``openvino`` extra is installed."""
    names = ("openvino", "openvino_genai", "openvino_tokenizers", "optimum.intel")
    try:
        return all(importlib.util.find_spec(name) for name in names)
    except ModuleNotFoundError:  # the parent package of optimum.intel
        return False


_NOT_INSTALLED = "OpenVINO is not installed; `pip install fastdraft_hf[openvino]`"


def require_openvino() -> None:
    """Raise `FastDraftError` when the ``openvino`` extra is missing."""
    if not openvino_available():
        raise FastDraftError(_NOT_INSTALLED)


def openvino_obstacle(model: Path) -> str | None:
    """Return why a model's folder cannot be exported to OpenVINO here, or ``None``.

    Many families of transformers are unknown to optimum-intel, and some only to other versions.
    """
    if not openvino_available():
        return _NOT_INSTALLED
    config = read_json(model / "config.json")
    if "text_config" in config:  # optimum finds the text part by itself
        return None
    from importlib.metadata import version

    from optimum.exporters.tasks import TasksManager
    from packaging.version import Version
    from transformers import __version__

    _register_exporters()
    family = config.get("model_type", "")
    refused = f"optimum-intel {version('optimum-intel')} cannot export family '{family}'"
    try:
        exporter = TasksManager.get_exporter_config_constructor(
            "openvino", model_type=family, task=_TASK, library_name="transformers"
        )
    except (KeyError, ValueError):
        return f"{refused} to OpenVINO"
    lowest, highest = (
        getattr(exporter.func, f"{end}_TRANSFORMERS_VERSION", None) for end in ("MIN", "MAX")
    )
    if highest is not None and Version(__version__) > Version(str(highest)):
        return f"{refused} with transformers {__version__}, only up to {highest}"
    if lowest is not None and Version(__version__) < Version(str(lowest)):
        return f"{refused} with transformers {__version__}, only from {lowest}"
    return None


def use_openvino(wanted: str | None, device: str, key: str, *models: Path) -> bool:
    """Return whether OpenVINO runs these models: if it is asked for, and on a CPU by default.

    By default PyTorch runs what cannot be exported, with a warning.

    Args:
        wanted: ``openvino``; ``auto`` or ``None`` for the default; another engine.
        device: cpu or cuda.
        key: the setting's name.
        models: folders.

    Raises:
        FastDraftError: it is asked for, and not installed or cannot export one of them.
    """
    by_default = wanted in ("auto", None) and device == "cpu" and openvino_available()
    if wanted != "openvino" and not by_default:
        return False
    obstacle = next(filter(None, map(openvino_obstacle, models)), None)
    if obstacle is not None:
        if not by_default:
            raise FastDraftError(f"{key}: {obstacle}")
        logger.warning("%s: PyTorch runs the model, which is slower: %s", key, obstacle)
    return obstacle is None


def _register_exporters() -> None:
    """Let optimum know its OpenVINO exporters, and Gemma's with the transformers of today.

    optimum-intel 2.1 allows Gemma up to transformers 5.0. The exports of later versions equal
    PyTorch (tests/export/test_openvino_export.py).
    """
    from optimum.exporters.openvino import model_configs

    model_configs.GemmaOpenVINOConfig.MAX_TRANSFORMERS_VERSION = None


def export_openvino(*jobs: tuple[Path, Path, WeightFormat]) -> None:
    """Write models as OpenVINO IR, in one child process; a folder appears when it is complete.

    A reduced vocabulary stays reduced, with logits of the full size (`score_only`).

    Args:
        jobs: (model, output, weight format) of each. Without a tokenizer, none is exported. An
            output that exists counts as finished. int8 and int4 compress only weights (NNCF).

    Raises:
        FastDraftError: OpenVINO is missing, or an export fails (with the exporter's last lines);
            finished exports stay.
    """
    require_openvino()
    due = [(str(model), str(output), form) for model, output, form in jobs if not output.exists()]
    if not due:
        return
    done = subprocess.run(
        [sys.executable, "-m", "fastdraft_hf.export.openvino"],
        input=json.dumps(due),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # The models are on disk: without this, optimum asks the Hub about them.
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    # Another process may have finished the same export first.
    if missing := [model for model, output, _ in due if not Path(output).exists()]:
        tail = "\n".join(done.stdout.strip().splitlines()[-5:])
        raise FastDraftError(f"OpenVINO export of {', '.join(missing)} failed:\n{tail}")


def main() -> None:
    """Export the jobs on standard input."""
    from optimum.commands.optimum_cli import main as optimum_cli
    from optimum.exporters.tasks import TasksManager

    load = TasksManager.get_model_from_task

    def load_reduced(task: str, name: str, **kwargs: Any) -> Any:
        found, head = load(task, name, **kwargs), read_reduced_vocabulary(name)
        if head is not None:
            score_only(found, head)
        return found

    TasksManager.get_model_from_task = load_reduced
    _register_exporters()
    jobs = json.load(sys.stdin)
    for model, output, weight_format in jobs:
        with atomic_folder(Path(output)) as temporary:
            sys.argv = ["optimum-cli", "export", "openvino", "--model", model]
            sys.argv += ["--task", _TASK, "--weight-format", weight_format]
            if weight_format == "int4" and (size := _group_size(Path(model))) is not None:
                sys.argv += ["--group-size", str(size)]
            sys.argv.append(str(temporary))
            optimum_cli()
            head = read_reduced_vocabulary(model)
            if head is not None:
                write_reduced_vocabulary(temporary, head)


def score_only(model: PreTrainedModel, token_ids: Sequence[int]) -> None:
    """Reduce a model's head in place; its logits keep their size, `LOWEST` where nothing is scored.

    OpenVINO GenAI and ``OVModelForCausalLM`` then use the exported model like any other.
    """
    import torch

    columns = torch.full((model.get_output_embeddings().weight.shape[0],), len(token_ids))
    reduce_model(model, token_ids)
    columns[list(token_ids)] = torch.arange(len(token_ids))

    def widen(head: Any, inputs: Any, logits: Any) -> Any:
        padded = torch.nn.functional.pad(logits, (0, 1), value=LOWEST)
        return padded.index_select(-1, columns)

    model.get_output_embeddings().register_forward_hook(widen)


def _group_size(model: Path) -> int | None:
    """Return how many weights share a scale in int4; None keeps NNCF's default of 128.

    A draft's widths are seldom multiples of 128, and NNCF then refuses the model. (optimum-intel
    2.1 does not pass on NNCF's fallback to smaller groups.)
    """
    config = read_json(model / "config.json")
    heads, width = config.get("num_attention_heads"), config.get("hidden_size")
    if not heads or not width:
        return None
    widths = [width, heads * (config.get("head_dim") or width // heads)]
    widths.append(config.get("intermediate_size") or width)
    fitting = [size for size in (128, 64, 32) if not any(w % size for w in widths)]
    if fitting[:1] == [128]:
        return None
    return fitting[0] if fitting else -1  # -1: one scale per column


def cached_openvino(model: Path, weight_format: WeightFormat) -> Path:
    """Return the IR of a model that does not change (a target), exporting it once per machine."""
    facts = [str(model.resolve())]
    for file in sorted(model.iterdir()):
        if file.suffix in (".safetensors", ".json"):
            status = file.stat()
            facts.append(f"{file.name} {status.st_size} {status.st_mtime_ns}")
    key = hashlib.sha256("\n".join(facts).encode()).hexdigest()[:16]
    folder = cache_dir("openvino") / f"{model.name}-{key}-{weight_format}"
    if not folder.exists():
        check_finite(model)  # OpenVINO would generate token 0 without an error
        export_openvino((model, folder, weight_format))
    return folder


if __name__ == "__main__":
    main()
