"""Stage export: the trained draft in other engines' formats."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from fastdraft_hf._extras import openvino_available
from fastdraft_hf.export.openvino import export_openvino
from fastdraft_hf.pipeline.run import Run

logger = logging.getLogger(__name__)


def run(run: Run, folder: Path) -> dict[str, Any]:
    """Write ``openvino-<format>`` folders."""
    formats = run.recipe.export.openvino
    if formats and not openvino_available():
        logger.warning("export: OpenVINO is not installed, so no OpenVINO folder is made")
        return {"openvino": [], "left_out": "the openvino extra is not installed"}
    sizes = {}
    for weight_format in formats:
        output = folder / f"openvino-{weight_format}"
        if not output.exists():
            logger.info("export: OpenVINO %s", weight_format)
            export_openvino(run.latest_model(), output, weight_format)
        sizes[weight_format] = (output / "openvino_model.bin").stat().st_size
    return {"openvino": list(formats), "weight_bytes": sizes}
