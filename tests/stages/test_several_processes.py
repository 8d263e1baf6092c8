"""Stages generate and logits in two real processes, killed and resumed by another number."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from fastdraft_hf.data.parts import PARTS, iter_rows
from fastdraft_hf.recipe import build_recipe

# With one more argument, a process ends by SIGKILL once it has written a part into that folder.
SCRIPT = """
import os, signal, sys
from pathlib import Path
from fastdraft_hf.recipe import read_recipe
from fastdraft_hf.stages.runner import Run, execute
from fastdraft_hf.data import parts
from fastdraft_hf.data.parts import PartWriter
def flush(self, write=PartWriter.flush):
    write(self)
    if list(Path(sys.argv[2]).glob("part-00001-*")):
        os.kill(os.getpid(), signal.SIGKILL)
parts.ROWS_PER_PART = 4
if len(sys.argv) > 2:
    PartWriter.flush = flush
recipe = read_recipe(Path(sys.argv[1]))
execute(Run(recipe, Path(recipe.output_dir)), ["generate", "logits"])
"""
SETS = {
    "chat": {"kind": "magpie", "rows": 30, "max_new_tokens": 12, "instruction_temperatures": [0.7]},
    "text": {"kind": "free", "rows": 60, "max_new_tokens": 60, "temperatures": [1.0, 0.5]},
}


class Launch:
    """Processes that run the stages of a recipe together."""

    def __init__(self, folder: Path, target: Path, world: int, *killed: str) -> None:
        recipe = folder.with_suffix(".yaml")
        sections: dict[str, Any] = {
            "target": str(target),
            "device": "cpu",
            "output_dir": str(folder),
            "generate": {
                "engine": "transformers",
                "sets": SETS,
                "batch_size": 3,
            },
            "logits": {"engine": "transformers", "top_k": 4},
        }
        recipe.write_text(yaml.safe_dump(build_recipe(sections).resolved()))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        common = {
            **os.environ,
            "PYTHONPATH": str(Path(__file__).parents[2]),
            "OMP_NUM_THREADS": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        self.processes = [
            subprocess.Popen(
                [sys.executable, "-c", SCRIPT, str(recipe), *(killed if rank == 1 else ())],
                env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
                if world > 1
                else common,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank in range(world)
        ]

    def finish(self) -> None:
        for process in self.processes:
            said, _ = process.communicate(timeout=240)
            assert process.returncode == 0, said

    def end(self) -> None:
        """Wait for the process that kills itself; the others are stopped, as launchers do."""
        said, _ = self.processes[1].communicate(timeout=240)
        assert self.processes[1].returncode == -signal.SIGKILL, said
        for process in self.processes:
            process.kill()
            process.communicate()


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, tiny_target_folder: Path) -> Path:
    folder = tmp_path_factory.mktemp("run") / "alone"
    Launch(folder, tiny_target_folder, 1).finish()
    return folder


@pytest.mark.parametrize("killed", ["generate", pytest.param("logits", marks=pytest.mark.slow)])
def test_killed_and_resumed_by_another_number_of_processes(
    tmp_path: Path, tiny_target_folder: Path, alone: Path, killed: str
) -> None:
    folder = tmp_path / "shared"
    first, second = (2, 3) if killed == "generate" else (3, 1)
    parts = str(folder / f".{killed}.partial" / "text")
    Launch(folder, tiny_target_folder, first, parts).end()
    assert not (folder / killed).exists()
    Launch(folder, tiny_target_folder, second).finish()
    for name in ("chat/instructions", "chat", "text"):
        rows = list(iter_rows(folder / "generate" / name))
        assert rows == list(iter_rows(alone / "generate" / name))
        assert [row["index"] for row in rows] == list(range(len(rows)))
    assert len(rows) == 60
    cards = [(run / "generate" / "chat" / "README.md").read_text() for run in (folder, alone)]
    assert cards[0] == cards[1]
    ranks = {path.name.split("-")[1] for path in (folder / killed / "text").glob(PARTS)}
    assert len(ranks) > 1
    stored = [list(iter_rows(run / "logits" / "text")) for run in (folder, alone)]
    names = ["index", "input_ids", "labels", "target_top_k_ids"]
    assert [[row[n] for n in names] for row in stored[0]] == [
        [row[n] for n in names] for row in stored[1]
    ]
