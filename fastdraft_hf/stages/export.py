"""Stage export: the trained draft in other engines' formats, compared with PyTorch."""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastdraft_hf._atomic import write_json
from fastdraft_hf._extras import openvino_available
from fastdraft_hf.eval.bench import REDUCED
from fastdraft_hf.export.gguf import export_gguf
from fastdraft_hf.export.openvino import WeightFormat, export_openvino
from fastdraft_hf.export.parity import read_gguf
from fastdraft_hf.recipe import resolve_device
from fastdraft_hf.stages import exporting
from fastdraft_hf.stages.runner import Run
from fastdraft_hf.target.resolve import stop_ids

logger = logging.getLogger(__name__)


def run(run: Run, folder: Path) -> dict[str, Any]:
    """Write ``openvino-<format>`` folders and ``draft-<type>.gguf`` files.

    With a section ``reduced_vocabulary`` also ``reduced-openvino-<format>``; GGUF has none.
    """
    config = run.recipe.export
    formats = list(config.openvino)
    facts: dict[str, Any] = {}
    if formats and not openvino_available():
        logger.warning("export: OpenVINO is not installed, so no OpenVINO folder is made")
        formats = []
        facts["left_out"] = "the openvino extra is not installed"
    facts["openvino"] = formats
    if not formats and not config.gguf:
        return facts
    model = run.latest_model()
    sizes: dict[str, int] = {}
    loaders: dict[str, Callable[[], Any]] = {}

    def openvino(source: Path, weight_format: WeightFormat, kind: str = "") -> None:
        output = folder / f"{kind and kind + '-'}openvino-{weight_format}"
        name = f"{kind} OpenVINO {weight_format}".strip()
        if not output.exists():
            logger.info("export: %s", name)
            export_openvino(source, output, weight_format)
        if config.check:
            _check(folder, output.name, name, exporting.check_openvino, source, weight_format)
        size = (output / "openvino_model.bin").stat().st_size
        sizes[f"{kind} {weight_format}".strip()] = size
        loaders[name] = functools.partial(exporting.load_openvino, output)

    for weight_format in formats:
        openvino(model, weight_format)
    if run.recipe.reduced_vocabulary is not None:
        for weight_format in formats:
            if weight_format == "int4":
                logger.warning(
                    "export: a reduced vocabulary is not cut out of int4, so it is left out"
                )
            else:
                openvino(run.stage_folder("reduced_vocabulary"), weight_format, REDUCED)
    for weight_type in config.gguf:
        output = folder / f"draft-{weight_type}.gguf"
        if not output.exists():
            logger.info("export: GGUF %s", weight_type)
            export_gguf(model, output, weight_type)
        name = f"GGUF {weight_type}"
        if config.check:
            _check(folder, output.name, name, exporting.check_gguf, model, weight_type)
        sizes[f"gguf {weight_type}"] = output.stat().st_size
        loaders[name] = functools.partial(read_gguf, model, output)
    facts["weight_bytes"] = sizes
    if config.gguf:
        facts["gguf"] = list(config.gguf)
    if config.acceptance_texts:
        facts["acceptance"] = _acceptance(run, folder, model, loaders)
    return facts


def _check(
    folder: Path, file: str, name: str, check: Callable[..., Any], model: Path, form: str
) -> None:
    """Compare one export with PyTorch, once: its record is found again after a kill."""
    record = folder / f"parity-{file}.json"
    if record.exists():
        return
    found = check(model, folder / file, form)
    for line in found.lines():
        logger.info("%s against PyTorch: %s", name, line)
    write_json(record, found.facts())


def _acceptance(
    run: Run, folder: Path, model: Path, loaders: dict[str, Callable[[], Any]]
) -> dict[str, Any]:
    from transformers import AutoTokenizer

    record = folder / "acceptance.json"
    if not record.exists():
        target, evaluate = run.target.path, run.recipe.evaluate
        reading = exporting.read_acceptance(
            target,
            {"PyTorch": functools.partial(exporting.load_pytorch, model), **loaders},
            ends=stop_ids(target, AutoTokenizer.from_pretrained(target)),
            texts=run.recipe.export.acceptance_texts,
            temperature=evaluate.sampled[0],
            num_assistant_tokens=evaluate.gammas[0],
            seed=run.recipe.seed,
            device=resolve_device(run.recipe.device),
        )
        for line in reading.lines():
            logger.info(line)
        write_json(record, reading.facts())
    found: dict[str, Any] = json.loads(record.read_text(encoding="utf-8"))
    return found
