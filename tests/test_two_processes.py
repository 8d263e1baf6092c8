"""One recipe, from generate to evaluate, in one process and in two: the same draft to 1e-5."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

from fastdraft_hf.data.parts import PARTS, iter_rows
from fastdraft_hf.eval.summary import stage_rows

RUN = Path(__file__).resolve().parents[1] / "recipes" / "run.py"
BEGUN = re.compile(r"^\w+: (starts|resumes)$", re.MULTILINE)
STAGES = ("design", "generate", "logits", "pretrain", "align", "evaluate")
TRAINED = ("pretrain", "align")


def recipe(target: Path, batch: int) -> dict[str, Any]:
    """Return a recipe whose steps have four rows, with ``batch`` rows per process."""
    training = {
        "max_length": 64,
        "per_device_train_batch_size": batch,
        "eval_rows": 2,
        "logging_steps": 1,
        "save_steps": 2,
        "learning_rate": 1e-3,
        "sampled_softmax": 32,  # both processes draw the same ids
        # bfloat16 products round differently for every split of a batch.
        "head_dtype": "float32",
        "bf16": False,
    }
    return {
        "target": str(target),
        "device": "cpu",
        "design": {"params": "20k", "num_hidden_layers": 1, "hidden_size": 16},
        "generate": {
            "engine": "transformers",
            # A row's sums are rounded by the batch that it is in, which a kill changes.
            "batch_size": 1,
            "sets": {
                "text": {"kind": "free", "rows": 24, "max_new_tokens": 40, "temperatures": [1.0]},
                "more": {
                    "kind": "magpie",
                    "rows": 30,
                    "max_new_tokens": 12,
                    "instruction_temperatures": [0.7],
                },
            },
        },
        "logits": {"engine": "transformers", "top_k": 8},
        "pretrain": {
            "sources": [{"name": "text"}],
            "max_train_tokens": 1024,
            **training,
        },
        "align": {
            "sources": [{"name": "text"}, {"name": "more"}],
            "objective": "kl",
            "target_distribution": "stored",
            "max_train_tokens": 900,
            **training,
        },
        "evaluate": {
            "tasks": ["humaneval"],
            "prompts_per_task": 2,
            "max_new_tokens": 4,
            "max_prompt_tokens": 2000,
            "untrained_prompts_per_task": 0,
        },
    }


def _default_signals() -> None:
    """Undo `nohup` and a shell's `&`, below which processes ignore these signals."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


class Run:
    """A recipe started by recipes/run.py in one or two processes, as torchrun does."""

    def __init__(self, folder: Path, target: Path, world: int) -> None:
        self.folder, self.world = folder, world
        self._file = folder.with_suffix(".yaml")
        settings = {**recipe(target, 4 // world), "output_dir": str(folder)}
        self._file.write_text(yaml.safe_dump(settings), encoding="utf-8")
        self._log = folder.with_suffix(".log")
        self._log.touch()

    def start(self) -> list[subprocess.Popen[bytes]]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        processes = []
        with self._log.open("ab") as log:
            for rank in range(self.world):
                several = {
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank),
                    "WORLD_SIZE": str(self.world),
                    "LOCAL_WORLD_SIZE": str(self.world),
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": str(port),
                }
                processes.append(
                    subprocess.Popen(
                        [sys.executable, str(RUN), str(self._file), "--stages", ",".join(STAGES)],
                        stdout=log,
                        stderr=log,
                        env={**environment, **(several if self.world > 1 else {})},
                        preexec_fn=_default_signals,
                    )
                )
        return processes

    def finish(self) -> None:
        for process in self.start():
            assert process.wait(timeout=600) == 0, self.log()

    def finished_before(self, seconds: float, killed: Sequence[int], after: float) -> bool:
        """Run; SIGKILL some processes this long after work began, the others a while later."""
        before = len(self.log())
        processes = self.start()
        while all(p.poll() is None for p in processes) and not BEGUN.search(self.log(), before):
            time.sleep(0.05)
        try:
            for process in processes:
                start = time.monotonic()
                assert process.wait(timeout=max(0.01, seconds)) == 0, self.log()
                seconds -= time.monotonic() - start
            return True
        except subprocess.TimeoutExpired:
            for rank in killed:
                processes[rank].kill()
            time.sleep(after)
            for process in processes:
                process.kill()
                process.wait()
            return False

    def kill(self, stage: str, pattern: str, number: int = signal.SIGKILL) -> None:
        """Signal one process once a stage has written a file; the other notices by itself.

        A stage that was finished before the signal came is deleted and runs again.
        """
        for _ in range(5):
            processes = self.start()
            end = time.monotonic() + 200
            while not list((self.folder / f".{stage}.partial").glob(pattern)):
                assert time.monotonic() < end, self.log()
                if processes[-1].poll() is not None or (self.folder / stage).exists():
                    break
                time.sleep(0.005)
            before = len(self.log())
            processes[-1].send_signal(number)
            if number == signal.SIGKILL:
                for other in processes[:-1]:
                    assert other.wait(timeout=120) == 1, self.log()
                    said = "fastdraft: another process has ended; the same command resumes"
                    assert said in self.log()[before:]
            elif not (self.folder / stage).exists():
                status = processes[-1].wait(timeout=60)
                assert status == (130 if number == signal.SIGINT else -number), self.log()
            for process in processes:
                process.kill()
                process.wait()
            if not (self.folder / stage).exists():
                return
            shutil.rmtree(self.folder / stage)
        pytest.fail(f"{stage} was finished before each of five signals: {self.log()}")

    def log(self) -> str:
        return self._log.read_text(encoding="utf-8", errors="replace")

    def rows(self, name: str) -> list[dict[str, Any]]:
        return list(iter_rows(self.folder / "generate" / name))

    def losses(self, stage: str) -> list[float]:
        log = json.loads((self.folder / stage / "log.json").read_text(encoding="utf-8"))
        return [entry["loss"] for entry in log if "loss" in entry]

    def weights(self, stage: str) -> dict[str, Any]:
        return load_file(self.folder / stage / "model.safetensors")

    def check_equal(self, other: Run, tolerance: float) -> None:
        """Compare rows, losses, weights and acceptance; every row is there once."""
        for name in ("text", "more/instructions", "more"):
            rows = self.rows(name)
            assert [row["index"] for row in rows] == list(range(len(rows)))
            assert rows == other.rows(name)
        for stage in TRAINED:
            assert self.losses(stage) == pytest.approx(other.losses(stage), abs=tolerance)
            ours, theirs = self.weights(stage), other.weights(stage)
            assert ours.keys() == theirs.keys()
            for name in ours:
                assert (ours[name] - theirs[name]).abs().max() <= tolerance, (stage, name)
        results = [
            json.loads((run.folder / "evaluate" / "results.json").read_text(encoding="utf-8"))
            for run in (self, other)
        ]
        rates = [result["overall"]["sampled"]["acceptance_rate"] for result in results]
        assert rates[0] == pytest.approx(rates[1], abs=1e-4)
        assert all(result["greedy_identical"] == result["greedy_prompts"] for result in results)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, tiny_target_folder: Path) -> Run:
    run = Run(tmp_path_factory.mktemp("one") / "run", tiny_target_folder, 1)
    run.finish()
    assert len(run.losses("align")) > 3
    return run


def test_two_processes_are_one(tmp_path: Path, tiny_target_folder: Path, alone: Run) -> None:
    two = Run(tmp_path / "run", tiny_target_folder, 2)
    two.kill("generate", f"text/{PARTS}")
    # Rows belong to nobody: another number of processes resumes.
    Run(tmp_path / "run", tiny_target_folder, 1).kill("logits", f"text/{PARTS}")
    two = Run(tmp_path / "run", tiny_target_folder, 2)
    two.kill("align", "work/checkpoint-*/complete")
    for complete in two.folder.glob(".align.partial/work/checkpoint-*/complete"):
        # Written after the files of all processes.
        assert {"rng_state_0.pth", "rng_state_1.pth"} <= json.loads(complete.read_text()).keys()
    two.finish()
    assert "Traceback" not in two.log()
    writers = {path.name.split("-")[1] for path in (two.folder / "logits").rglob(PARTS)}
    assert writers == {"00000", "00001"}
    two.check_equal(alone, 1e-5)
    records = {s: json.loads((two.folder / s / "provenance.json").read_text()) for s in STAGES}
    (logits,) = (row["what"] for row in stage_rows(records) if row["stage"] == "logits")
    texts = sum(len(two.rows(name)) for name in ("text", "more"))
    assert logits == f"the target's distribution for {texts} texts"


def test_one_process_resumes_bit_for_bit(
    tmp_path: Path, tiny_target_folder: Path, alone: Run
) -> None:
    one = Run(tmp_path / "run", tiny_target_folder, 1)
    one.kill("generate", f"text/{PARTS}", signal.SIGTERM)
    one.kill("logits", f"text/{PARTS}", signal.SIGHUP)
    one.kill("align", "work/checkpoint-*/complete", signal.SIGINT)
    assert "fastdraft: interrupted; the same command resumes" in one.log()
    assert "Traceback" not in one.log()
    one.finish()
    one.check_equal(alone, 0.0)


@pytest.mark.slow
def test_forty_kills_of_one_process_or_both(tmp_path: Path, tiny_target_folder: Path) -> None:
    """A run that finishes between kills is compared and starts again in an empty folder."""
    whole = Run(tmp_path / "whole", tiny_target_folder, 2)
    whole.finish()
    moments = random.Random(2)
    kills = runs = 0
    while kills < 40:
        runs += 1
        two = Run(tmp_path / f"killed-{runs}", tiny_target_folder, 2)
        while kills < 40 and not two.finished_before(
            moments.expovariate(1 / 5),
            moments.choice([[0], [1], [0, 1]]),
            moments.uniform(0, 2),
        ):
            kills += 1
        two.finish()
        two.check_equal(whole, 0.0)
