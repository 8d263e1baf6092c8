"""How long `fastdraft --help` takes, as a whole process, against Python doing nothing.

    python benchmarks/cli_start.py [--runs 20]

The two are run in turn, so that a drift of the machine's speed falls on both.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time


def seconds(command: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=20)
    runs = parser.parse_args().runs
    commands = {
        "python -c pass": [sys.executable, "-c", "pass"],
        "fastdraft --help": [sys.executable, "-m", "fastdraft_hf.cli.main", "--help"],
    }
    times: dict[str, list[float]] = {name: [] for name in commands}
    for run in range(runs + 1):
        for name, command in commands.items():
            taken = seconds(command)
            if run:  # the first fills the disk cache
                times[name].append(taken)
    for name, taken in times.items():
        low, middle, high = min(taken), statistics.median(taken), max(taken)
        print(f"{name:<18} median {middle * 1e3:6.1f} ms ({low * 1e3:.1f} to {high * 1e3:.1f})")


if __name__ == "__main__":
    main()
