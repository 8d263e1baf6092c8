"""Peak memory of a path, measured in a process of its own.

In the process that times them, all paths of a runtime share one target, and memory that one of
them took is never seen to be given back: the peaks cannot be told apart. So a fresh process loads
what one path needs and nothing else, decodes one prompt, and says what the kernel counted. The
figure includes Python, PyTorch or OpenVINO themselves (some hundred MiB), as it does for a user.

``VmHWM`` belongs to the memory of a process and starts anew with a program; ``getrusage`` hands a
parent's peak down to its children, so it would tell this process's. Weights that are mapped from
a file count from when they are first read.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastdraft_hf._atomic import write_json
from fastdraft_hf._progress import Progress
from fastdraft_hf.eval.bench import Setting
from fastdraft_hf.eval.engines import Models, load_engine
from fastdraft_hf.eval.prompts import EvaluationPrompt

logger = logging.getLogger(__name__)

Peaks = dict[str, int | None]


def largest_settings(settings: Sequence[Setting]) -> list[Setting]:
    """Return each path and draft once, at its largest γ; our loop without a draft is left out."""
    largest: dict[str, Setting] = {}
    for setting in settings:
        known = largest.get(setting.name)
        if known is None or setting.num_assistant_tokens > known.num_assistant_tokens:
            largest[setting.name] = setting
    return list(largest.values())


def measure(
    models: Models,
    settings: Sequence[Setting],
    prompts: Sequence[EvaluationPrompt],
    max_new_tokens: int,
    saved: Path,
) -> dict[str, Peaks]:
    """Return the peaks of each path on the longest prompt.

    Args:
        models: where the models lie.
        settings: what was timed, baselines included.
        prompts: the benchmark's.
        max_new_tokens: length of the answer.
        saved: a file that keeps what was measured, for a killed run to go on with.

    Returns:
        name of a path -> ``peak_bytes``, resident bytes at most from start to end, and
        ``gpu_peak_bytes``, allocated on a GPU at most; ``None`` where a system does not tell. A
        path whose process failed is missing, with a warning.
    """
    longest = max(prompts, key=lambda prompt: len(prompt.ids))
    found: dict[str, Peaks] = {}
    if saved.exists():
        found = json.loads(saved.read_text(encoding="utf-8"))
    due = [s for s in largest_settings(settings) if s.name not in found]
    with Progress("bench memory", len(due) + len(found), "paths", done=len(found)) as progress:
        for setting in due:
            peaks = _in_a_process(models, setting, longest, max_new_tokens)
            if peaks is not None:
                found[setting.name] = peaks
                write_json(saved, found)
            progress.advance(1)
    return found


def _in_a_process(
    models: Models, setting: Setting, prompt: EvaluationPrompt, max_new_tokens: int
) -> Peaks | None:
    task = {
        "models": dataclasses.asdict(models),
        "setting": dataclasses.asdict(setting),
        "prompt": dataclasses.asdict(prompt),
        "max_new_tokens": max_new_tokens,
    }
    result = subprocess.run(
        [sys.executable, "-m", "fastdraft_hf.eval.memory"],
        input=json.dumps(task),
        capture_output=True,
        text=True,
        # The models lie on disk; nothing has to be asked of the Hub.
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    lines = result.stdout.strip().splitlines()
    if result.returncode != 0 or not lines:
        why = (result.stderr.strip().splitlines() or [f"exit status {result.returncode}"])[-1]
        logger.warning("bench: the memory of %s could not be measured (%s)", setting.name, why)
        return None
    peaks: Peaks = json.loads(lines[-1])
    return peaks


def resident_peak() -> int | None:
    """Return the peak resident memory of this process in bytes; ``None`` where it is not told."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    match = re.search(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE)
    return int(match.group(1)) * 1024 if match else None


def main() -> None:
    """Do what standard input says and print the peaks as the last line."""
    task: dict[str, Any] = json.load(sys.stdin)
    setting = Setting(**task["setting"])
    prompt = EvaluationPrompt(**task["prompt"])
    models = Models(**task["models"])
    decode = load_engine(models, [setting])
    decode(setting, prompt, task["max_new_tokens"])
    gpu = None
    if models.device == "cuda":
        import torch

        gpu = torch.cuda.max_memory_allocated()
    print(json.dumps({"peak_bytes": resident_peak(), "gpu_peak_bytes": gpu}))


if __name__ == "__main__":
    main()
