"""Runs stage generate in several processes: python forked_stage.py RECIPE COUNT.

The processes are forked from one that has imported what a stage needs, which takes the longest.
"""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path

import transformers.models.auto.tokenization_auto  # noqa: F401

import fastdraft_hf.stages.registry  # noqa: F401  (fills STAGES)
from fastdraft_hf.recipe import read_recipe
from fastdraft_hf.stages.runner import Run, execute


def main() -> None:
    recipe, count = read_recipe(Path(sys.argv[1])), int(sys.argv[2])
    pids = []
    for index in range(count):
        pid = os.fork()
        if not pid:
            os.environ["RANK"], os.environ["WORLD_SIZE"] = str(index), str(count)
            try:
                execute(Run(recipe, Path(recipe.output_dir)), ["generate"])
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        pids.append(pid)
    sys.exit(max(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids))


if __name__ == "__main__":
    main()
