"""Run a recipe in the processes that ``accelerate launch`` or ``torchrun`` starts.

    accelerate launch --config_file recipes/accelerate/multi_gpu.yaml recipes/run.py RECIPE.yaml
    torchrun --nproc_per_node 2 recipes/run.py RECIPE.yaml [--stages a,b] [key=value ...]

The arguments are those of ``fastdraft run``.
"""

import sys

from fastdraft_hf.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["run", *sys.argv[1:]]))
