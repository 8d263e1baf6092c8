"""Several exports in one process: most of a small draft's export is the import of what does it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from fastdraft_hf._atomic import atomic_folder
from fastdraft_hf._errors import FastDraftError
from fastdraft_hf.draft.reduced_vocabulary import read_reduced_vocabulary
from fastdraft_hf.export.openvino import WeightFormat, require_openvino
from fastdraft_hf.export.reduced_vocabulary import reduce_openvino


def export_several(
    jobs: Sequence[tuple[Path, Path, WeightFormat]],
    on_done: Callable[[], None] = lambda: None,
) -> None:
    """Export models as `fastdraft_hf.export.openvino.export_openvino` does, in one child process.

    A folder without a tokenizer is exported without one.

    Args:
        jobs: (model, output, weight format); an output that exists is taken as finished.
        on_done: called after every model.

    Raises:
        FastDraftError: OpenVINO is missing, or an export fails; what was finished stays.
    """
    require_openvino()
    due = [(str(model), str(output), form) for model, output, form in jobs if not output.exists()]
    for _ in range(len(jobs) - len(due)):
        on_done()
    if not due:
        return
    with tempfile.TemporaryFile("w+", encoding="utf-8") as log:
        with subprocess.Popen(
            [sys.executable, "-m", "fastdraft_hf.export.several"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        ) as child:
            assert child.stdin is not None
            assert child.stdout is not None
            json.dump(due, child.stdin)
            child.stdin.close()
            for line in child.stdout:
                if line.strip() == _DONE:
                    on_done()
        missing = [model for model, output, _ in due if not Path(output).exists()]
        if child.returncode or missing:
            log.seek(0)
            tail = "\n".join(log.read().strip().splitlines()[-5:])
            raise FastDraftError(f"OpenVINO export of {', '.join(missing)} failed:\n{tail}")


_DONE = "fastdraft: exported"


def main() -> None:
    """Do what standard input says; a line of standard output a finished model."""
    from optimum.commands.optimum_cli import main as optimum_cli

    jobs = json.load(sys.stdin)
    # Standard output is the parent's progress; what the exporter prints goes with its warnings.
    ours, sys.stdout = sys.stdout, sys.stderr
    for model, output, weight_format in jobs:
        with atomic_folder(Path(output)) as temporary:
            sys.argv = ["optimum-cli", "export", "openvino", "--model", model]
            sys.argv += ["--task", "text-generation-with-past"]
            sys.argv += ["--weight-format", weight_format, str(temporary)]
            optimum_cli()
            head = read_reduced_vocabulary(model)
            if head is not None:
                reduce_openvino(temporary, head.token_ids)
        print(_DONE, file=ours, flush=True)


if __name__ == "__main__":
    main()
