from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastdraft_hf.evaluation.summary import RunSummary


@pytest.fixture
def run_summary() -> RunSummary:
    """A finished run on two task sets; OpenVINO is a speed-up, transformers is none."""
    path = Path(__file__).parents[1] / "synthetic_run.json"
    return RunSummary(**json.loads(path.read_text(encoding="utf-8")))
