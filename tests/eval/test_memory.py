"""Peaks of processes that really run."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path

import numpy
import pytest

from fastdraft_hf.eval import bench, memory
from fastdraft_hf.eval.bench import Setting
from fastdraft_hf.eval.engines import Models
from fastdraft_hf.eval.prompts import EvaluationPrompt

PROMPTS = [EvaluationPrompt("humaneval", "H/0", (40,)), EvaluationPrompt("ifbench", "7", (40, 41))]


def test_each_path_is_measured_at_its_largest_setting() -> None:
    settings = bench.all_settings(
        bench.assisted_settings(["transformers", "ours"], [3, 1], ["other"])
    )
    assert memory.largest_settings(settings) == [
        Setting("alone"),
        Setting("ours", "", 3),
        Setting("transformers", "", 3),
        Setting("transformers", "other", 3),
        Setting("ours", "other", 3),
    ]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is told by /proc")
def test_a_process_of_its_own_tells_its_peak(tiny_target_folder: Path, tmp_path: Path) -> None:
    ballast = numpy.ones(2**30, numpy.uint8)  # this process's peak must not count
    saved = tmp_path / "memory.json"
    models = Models(target=str(tiny_target_folder))
    found = memory.measure(models, [Setting("alone")], PROMPTS, 4, saved)
    peak = found["alone"]["peak_bytes"]
    assert peak is not None
    assert 2**26 < peak < len(ballast)
    assert found["alone"]["gpu_peak_bytes"] is None
    own = memory.resident_peak()
    assert own is not None
    assert own > len(ballast)
    assert json.loads(saved.read_text(encoding="utf-8")) == found


def test_a_killed_run_measures_only_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked: list[tuple[str, str]] = []

    def fake(
        models: Models, setting: Setting, prompt: EvaluationPrompt, longest: int
    ) -> memory.Peaks | None:
        asked.append((setting.name, prompt.key))
        return {"peak_bytes": len(asked), "gpu_peak_bytes": None}

    monkeypatch.setattr(memory, "_in_a_process", fake)
    settings = [Setting("alone"), Setting("ours", "", 2)]
    saved = tmp_path / "memory.json"
    memory.measure(Models("t"), settings[:1], PROMPTS, 4, saved)
    found = memory.measure(Models("t"), settings, PROMPTS, 4, saved)
    assert asked == [("alone", "7"), ("ours", "7")]  # the longest prompt
    assert [peaks["peak_bytes"] for peaks in found.values()] == [1, 2]


def test_a_process_that_fails_is_no_end_of_the_benchmark(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho first >&2\necho out of memory >&2\nexit 3\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with caplog.at_level(logging.WARNING, logger="fastdraft_hf"):
        found = memory.measure(
            Models(str(tmp_path / "nothing")), [Setting("alone")], PROMPTS, 4, tmp_path / "m.json"
        )
    assert found == {}
    assert "the memory of alone could not be measured (out of memory)" in caplog.text
