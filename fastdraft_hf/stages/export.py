"""Stage export: the trained draft in other engines' formats, compared with PyTorch."""

from __future__ import annotations

import functools
import json
import logging
from pathlib import Path
from typing import Any

from fastdraft_hf._atomic import write_json
from fastdraft_hf._extras import openvino_available
from fastdraft_hf.draft.reduced_vocabulary import load_draft
from fastdraft_hf.eval.bench import REDUCED
from fastdraft_hf.export.gguf import export_gguf
from fastdraft_hf.export.openvino import export_openvino
from fastdraft_hf.export.parity import check_export
from fastdraft_hf.recipe import resolve_device
from fastdraft_hf.stages import exporting
from fastdraft_hf.stages.run import Run

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
    # (model, name of the form, output, weight format)
    jobs: list[tuple[Path, str, Path, Any]] = [
        (model, f"OpenVINO {form}", folder / f"openvino-{form}", form) for form in formats
    ]
    if run.recipe.reduced_vocabulary is not None:
        reduced = run.stage_folder("reduced_vocabulary")
        for form in formats:
            if form == "int4":
                logger.warning("export: a reduced vocabulary in int4 is not supported; left out")
                continue
            output = folder / f"{REDUCED}-openvino-{form}"
            jobs.append((reduced, f"{REDUCED} OpenVINO {form}", output, form))
    for kind in config.gguf:
        jobs.append((model, f"GGUF {kind}", folder / f"draft-{kind}.gguf", kind))
    sizes: dict[str, int] = {}
    loaders: dict[str, Any] = {"PyTorch": functools.partial(load_draft, model, dtype="float32")}
    for source, name, output, form in jobs:
        gguf = output.suffix == ".gguf"
        if not output.exists():
            logger.info("export: %s", name)
            (export_gguf if gguf else export_openvino)(source, output, form)
        parity = output.with_name(f"parity-{output.name}.json")
        if config.check and not parity.exists():
            found = check_export(source, output, form)
            for line in found.lines():
                logger.info("%s against PyTorch: %s", name, line)
            write_json(parity, found.facts())
        key = name.replace("OpenVINO ", "").replace("GGUF", "gguf")
        sizes[key] = (output if gguf else output / "openvino_model.bin").stat().st_size
        loaders[name] = functools.partial(exporting.load_exported, source, output)
    facts["weight_bytes"] = sizes
    if config.gguf:
        facts["gguf"] = list(config.gguf)
    if config.acceptance_texts:
        facts["acceptance"] = _acceptance(run, folder / "acceptance.json", loaders)
    return facts


def _acceptance(run: Run, record: Path, loaders: dict[str, Any]) -> dict[str, Any]:
    """Measure every form once; a resumed stage reads the record."""
    if not record.exists():
        evaluate = run.recipe.evaluate
        reading = exporting.read_acceptance(
            run.target.path,
            loaders,
            texts=run.recipe.export.acceptance_texts,
            temperature=evaluate.sampled[0],
            num_assistant_tokens=evaluate.gammas[0],
            seed=run.recipe.seed,
            device=resolve_device(run.recipe.device),
        )
        for line in exporting.acceptance_lines(reading):
            logger.info(line)
        write_json(record, reading)
    found: dict[str, Any] = json.loads(record.read_text(encoding="utf-8"))
    return found
