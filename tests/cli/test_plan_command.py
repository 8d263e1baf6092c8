"""`fastdraft plan`: the table, JSON, and words it refuses."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from fastdraft_hf.cli import main as cli

ROOT = Path(__file__).parents[2]
TARGETS = ROOT / "tests" / "fixtures" / "targets"
QUICKSTART = ROOT / "recipes" / "smollm2-135m" / "quickstart.yaml"
PHI3 = ROOT / "recipes" / "phi-3-mini" / "50m.yaml"


def test_the_command_prints_a_table_or_json(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = ["plan", str(PHI3), "--hardware", "1xRTX4090", f"output_dir={tmp_path}"]
    words += ["--target-config", str(TARGETS / "phi-3-mini-4k-instruct.json")]
    assert cli.main(words) == 0
    said = capsys.readouterr().out
    assert "49,945,088 parameters for microsoft/Phi-3-mini-4k-instruct, 3,821,079,552" in said
    assert "MORE MEMORY THAN A DEVICE HAS" in said  # 256 texts at once do not fit into 24 GB
    assert "RTX4090: 165 TFLOP/s" in said
    assert "Started with:\n- design, generate, pretrain" in said
    assert f"\n    fastdraft run {PHI3} output_dir={tmp_path}\n" in said
    assert "γ = 3" in said
    assert cli.main([*words, "--json", "--acceptance", "0.5", "--utilisation", "0.1"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["acceptance"] == 0.5
    assert [s["stage"] for s in plan["stages"]][:3] == ["design", "generate", "pretrain"]
    assert plan["total"]["seconds"] == pytest.approx(sum(s["seconds"] for s in plan["stages"]))
    assert not any(math.isnan(s["flops"]) for s in plan["stages"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--hardware", "9xZ1"], "--hardware: '9xZ1' is not known"),
        (["--hardware", "1xH100", "--utilisation", "2"], "--utilisation: between 0 and 1"),
        (["--hardware", "1xH100", "--acceptance", "0"], "--acceptance: between 0 and 1"),
        (["--utilisation", "0.5"], "--utilisation: a CPU is measured"),
    ],
)
def test_bad_words_are_one_line(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = ["--target-config", str(TARGETS / "smollm2-135m-instruct.json")]
    assert cli.main(["plan", str(QUICKSTART), *config, *words]) == 2
    error = capsys.readouterr().err.strip()
    assert said in error
    assert len(error.splitlines()) == 1
