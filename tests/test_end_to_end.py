"""A whole recipe through the real command line, on the real target, with kills in the middle."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from fastdraft_hf.export.openvino import openvino_available
from fastdraft_hf.stages import provenance

STAGES = [
    "design",
    "generate",
    "pretrain",
    "continue",
    "align",
    "reduced",
    "export",
    "evaluate",
    "bench",
    "draft",
    "report",
]
BEGUN = re.compile(r"^\w+: (starts|resumes)$", re.MULTILINE)
PNG = b"\x89PNG\r\n\x1a\n"
TRAIN = {
    "max_train_tokens": 384,
    "max_length": 64,
    "per_device_train_batch_size": 2,
    "eval_rows": 2,
    "logging_steps": 1,
}
DECODE = {"prompts_per_task": 1, "max_new_tokens": 8, "max_prompt_tokens": 120}

RECIPE: dict[str, Any] = {
    "target": "embedded:smollm2-135m-instruct",
    "seed": 0,
    "device": "cpu",
    "design": {"params": "6M", "num_hidden_layers": 1, "init": "project"},
    "generate": {
        "sets": {
            "text": {"kind": "free", "rows": 16, "max_new_tokens": 40, "temperatures": [1.0]},
            "chat": {"rows": 8, "max_new_tokens": 16, "max_instruction_tokens": 32},
            "code": {"kind": "code", "rows": 10, "max_new_tokens": 16},
        },
    },
    "pretrain": {**TRAIN, "sources": [{"name": "text"}]},
    "continue": {**TRAIN, "sources": [{"kind": "python"}, {"name": "text"}]},
    # Many small steps, so that a kill after the first checkpoint falls into the middle of them.
    "align": {
        **TRAIN,
        "sources": [{"name": "chat"}, {"name": "code"}],
        "max_train_tokens": 1200,
        "max_length": 128,
        "per_device_train_batch_size": 1,
        "logging_steps": 2,
        "save_steps": 3,
    },
    "reduced_vocabulary": {"draft_vocab_size": 4096},
    "export": {"acceptance_texts": 1},
    "evaluate": {**DECODE, "untrained_prompts_per_task": 1},
    "bench": {**DECODE, "num_assistant_tokens": [2]},
}

# What a user of the finished folder does: plain transformers and nothing of ours.
PLAIN_USE = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
target_folder, draft_folder = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(draft_folder)
target = AutoModelForCausalLM.from_pretrained(target_folder, dtype=torch.float32)
draft = AutoModelForCausalLM.from_pretrained(draft_folder, dtype=torch.float32)
inputs = tokenizer("def fibonacci(n):", return_tensors="pt")
alone = target.generate(**inputs, do_sample=False, max_new_tokens=8)
assisted = target.generate(**inputs, do_sample=False, max_new_tokens=8, assistant_model=draft)
assert alone.tolist() == assisted.tolist(), (alone, assisted)
assert draft.generation_config.num_assistant_tokens == 2, draft.generation_config
assert draft.generation_config.prompt_lookup_min == 3, draft.generation_config
assert 0.5 <= draft.generation_config.assistant_temperature_ratio <= 1.2, draft.generation_config
assert not [name for name in sys.modules if name.startswith("fastdraft_hf")]
print("used")
"""


class CommandLine:
    """The real command on one recipe and one output folder."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        self.folder = folder / "run"
        self._log = folder / "log.txt"
        self._log.touch()
        self._recipe = folder / "recipe.yaml"
        self._recipe.write_text(yaml.safe_dump(RECIPE, sort_keys=False), encoding="utf-8")

    def start(self) -> subprocess.Popen[bytes]:
        words = [sys.executable, "-m", "fastdraft_hf.cli.main", "run", str(self._recipe)]
        with self._log.open("ab") as log:
            return subprocess.Popen(
                [*words, f"output_dir={self.folder}"],
                stdout=log,
                stderr=log,
                # A group of its own: a kill takes the exporter it started along, as an
                # out-of-memory kill of a container would.
                start_new_session=True,
                env={**os.environ, "HF_HUB_OFFLINE": "1"},
            )

    def finish(self) -> None:
        status = self.start().wait()
        assert status == 0, self.log()

    def log(self) -> str:
        """Return everything that was printed; a slow machine prints more lines of progress."""
        return self._log.read_text(encoding="utf-8", errors="replace")

    def provenance(self, stage: str) -> dict[str, Any]:
        path = self.folder / stage / "provenance.json"
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return record

    def finished(self) -> dict[str, str]:
        """Return the identity of every finished stage."""
        done = [s for s in STAGES if (self.folder / s / "provenance.json").exists()]
        return {stage: self.provenance(stage)["id"] for stage in done}


def kill(process: subprocess.Popen[bytes]) -> None:
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def kill_when(process: subprocess.Popen[bytes], reached: Callable[[], bool]) -> bool:
    """Kill the process once ``reached()``; return False when it ended before."""
    while process.poll() is None:
        if reached():
            kill(process)
            return True
        time.sleep(0.02)
    return False


def check_generated(folder: Path) -> None:
    """Every row that was asked for stands in its set exactly once."""
    sets = RECIPE["generate"]["sets"]
    for name in (*sets, "chat/instructions"):
        parts = (folder / name).glob("*.parquet")
        indices = [i for part in parts for i in pq.read_table(part)["index"].to_pylist()]
        assert sorted(indices) == list(range(len(indices))), name
        if name == "chat":  # as many as there were usable instructions
            assert len(indices) <= sets["chat"]["rows"]
        else:
            assert len(indices) == sets[name.removesuffix("/instructions")]["rows"], name


def check_run(command: CommandLine, target_folder: Path) -> None:
    """Everything a finished run promises."""
    folder = command.folder
    assert sorted(command.finished()) == sorted(STAGES), command.log()
    left = [p.name for p in folder.iterdir() if "partial" in p.name]
    assert not left, left
    check_generated(folder / "generate")

    evaluation = json.loads((folder / "evaluate" / "results.json").read_text(encoding="utf-8"))
    assert evaluation["greedy_prompts"] == 3
    assert evaluation["greedy_identical"] == 3
    bench = json.loads((folder / "bench" / "results.json").read_text(encoding="utf-8"))
    paths = ["transformers", "openvino"] if openvino_available() else ["transformers"]
    assert list(bench["paths"]) == paths
    assert bench["paths"]["transformers"]["answers_differing"] == 0

    page = (folder / "report" / "report.html").read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>")
    assert page.count("data:image/png;base64,") == 3
    for name in ("losses.png", "acceptance.png", "speed.png"):
        assert (folder / "report" / name).read_bytes().startswith(PNG), name
    assert "assistant_model=draft" in (folder / "draft" / "README.md").read_text(encoding="utf-8")

    use = subprocess.run(
        [sys.executable, "-c", PLAIN_USE, str(target_folder), str(folder / "draft")],
        capture_output=True,
        text=True,
        cwd=folder,
    )
    assert use.returncode == 0, use.stderr
    assert use.stdout.strip().endswith("used")


def test_a_run_killed_in_training_resumes_and_finishes(tmp_path: Path, target_folder: Path) -> None:
    command = CommandLine(tmp_path)
    work = command.folder / ".align.partial" / "work"
    killed = kill_when(command.start(), lambda: any(work.glob("checkpoint-*/complete")))
    assert killed, command.log()
    before = command.finished()
    assert list(before) == ["design", "generate", "pretrain", "continue"]

    command.finish()
    after = command.finished()
    assert {stage: after[stage] for stage in before} == before
    assert command.provenance("align")["runs"] == 2
    assert all(command.provenance(s)["runs"] == 1 for s in STAGES if s != "align")
    assert re.search(r"resumed from .*align.*checkpoint-", command.log())
    steps = [e["step"] for e in json.loads((command.folder / "align/log.json").read_text())]
    assert steps == sorted(steps)  # the log of both runs is one log
    assert steps[0] == RECIPE["align"]["logging_steps"]
    check_run(command, target_folder)


@pytest.mark.slow
def test_forty_kills_at_random_moments(tmp_path: Path, target_folder: Path) -> None:
    """A run that finishes between kills is checked and starts again in an empty folder."""
    whole = CommandLine(tmp_path / "whole")
    whole.finish()
    expected = provenance.weights(whole.folder)
    assert len(expected) >= 5
    moments = random.Random(40)
    kills = runs = 0
    while kills < 40:
        runs += 1
        command = CommandLine(tmp_path / f"killed-{runs}")
        seen: dict[str, str] = {}
        status = None
        while status is None:
            before = len(command.log())
            process = command.start()
            while process.poll() is None and not BEGUN.search(command.log(), before):
                time.sleep(0.05)
            try:  # mostly soon after work began; some stages need a long time in one piece
                status = process.wait(moments.expovariate(1 / 12) if kills < 40 else None)
            except subprocess.TimeoutExpired:
                kill(process)
                kills += 1
            now = command.finished()
            assert {stage: now.get(stage) for stage in seen} == seen
            seen = now
        assert status == 0, command.log()
        torn = [p for stage in STAGES for p in (command.folder / stage).rglob("*.tmp")]
        assert not torn, torn
        check_run(command, target_folder)
        assert provenance.weights(command.folder) == expected
