"""Stage generate and stage logits through a real vLLM, which is killed in the middle.

    python benchmarks/server_generation.py [--rows 48] [--tokens 48]

vLLM runs in float32 on loopback (`engine_servers`). The set is generated twice: in one go; and
with SIGKILL to the server, another server, SIGKILL to `fastdraft`, and a last call. What both
have must be the same ids: a row depends on its seed and on rounding only. Then the server reads
the rows (`logits.engine: server`), and its distributions are compared with PyTorch's in float32.
The exit status is 1 if a call does not end as it should.
"""

from __future__ import annotations

import argparse
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
import yaml
from engine_servers import Server
from transformers import AutoModelForCausalLM

from fastdraft_hf.data.columns import stored
from fastdraft_hf.data.parts import iter_rows, stored_indices
from fastdraft_hf.target.resolve import resolve_target

TARGET = "embedded:smollm2-135m-instruct"


def call(work: Path, name: str, server: Server, stages: str) -> subprocess.Popen[str]:
    words = [sys.executable, "-m", "fastdraft_hf.cli.main", "run", str(work / "recipe.yaml")]
    words += ["--stages", stages, f"output_dir={work / name}"]
    words.append(f"generate.server={server.client.url}")
    return subprocess.Popen(words, stderr=subprocess.PIPE, text=True)


def rows_of(work: Path, name: str) -> int:
    folder = next((work / name).glob("*generate*/code"), None)
    return 0 if folder is None else len(stored_indices(folder))


def wait_for(answers: int, log: Path, process: subprocess.Popen[str]) -> None:
    """Wait until a server has given so many answers, by its log."""
    while process.poll() is None:
        if log.read_text(errors="replace").count("POST /v1/completions") >= answers:
            return
        time.sleep(0.1)


def ended(process: subprocess.Popen[str], expected: int, work: Path, name: str, what: str) -> None:
    _, said = process.communicate()
    line = " ".join(said.splitlines()[-1:])
    kept = f"{rows_of(work, name)} rows kept"
    print(f"{what}: exit {process.returncode}, {kept}, {line}", flush=True)
    if process.returncode != expected:
        sys.exit(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=48)
    parser.add_argument("--tokens", type=int, default=48, help="longest answer")
    parser.add_argument("--work", type=Path, default=Path("runs/server_generation"))
    args = parser.parse_args()
    work = args.work.resolve()
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    code = {"kind": "code", "rows": args.rows, "temperatures": [0.0, 0.7, 1.0]}
    code["max_new_tokens"] = args.tokens
    recipe = {
        "target": TARGET,
        "generate": {"sets": {"code": code}, "server_model": str(resolve_target(TARGET).path)},
        "logits": {"engine": "server", "top_k": 16, "sets": ["code"]},
    }
    recipe["generate"]["batch_size"] = 4  # type: ignore[index]
    (work / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    target = resolve_target(TARGET).path

    def server(name: str) -> Server:
        return Server("vllm", target, None, 0, exact=True, log=work / f"{name}.log")

    with server("whole") as running:
        start = time.monotonic()
        ended(call(work, "whole", running, "design,generate,logits"), 0, work, "whole", "in one go")
        print(f"{time.monotonic() - start:.0f} s")
    with server("first") as running:
        process = call(work, "killed", running, "design,generate")
        wait_for(args.rows // 3, work / "first.log", process)
        running.kill(signal.SIGKILL)
        ended(process, 2, work, "killed", "server killed")
    with server("second") as running:
        process = call(work, "killed", running, "design,generate")
        wait_for(args.rows // 3, work / "second.log", process)
        process.kill()
        ended(process, -signal.SIGKILL, work, "killed", "fastdraft killed")
        ended(call(work, "killed", running, "design,generate"), 0, work, "killed", "run again")
    one, two = (
        list(iter_rows(next((work / name).glob("*generate*/code")))) for name in ("whole", "killed")
    )
    for temperature in sorted({row["temperature"] for row in one}):
        pairs = [(a, b) for a, b in zip(one, two, strict=True) if a["temperature"] == temperature]
        same = sum(a["completion_ids"] == b["completion_ids"] for a, b in pairs)
        print(f"T = {temperature:.1f}: {same} of {len(pairs)} rows have the same ids")
    compare(next((work / "whole").glob("*logits*/code")), target)


def compare(folder: Path, target: Path) -> None:
    """Print how far the stored distributions are from a forward pass in float32."""
    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).eval()
    furthest, tokens = 0.0, 0
    for row in iter_rows(folder):
        positions, ids, log_probs = stored(row)
        with torch.inference_mode():
            exact = model(torch.tensor([row["input_ids"]])).logits[0].log_softmax(-1)
        # The token at t is predicted from position t - 1.
        found = exact[positions - 1].gather(1, torch.tensor(ids, dtype=torch.int64))
        furthest = max(furthest, float((found - torch.tensor(log_probs)).abs().max()))
        tokens += len(positions)
    print(f"distributions of {tokens} tokens: log-probabilities differ by {furthest:.4f} at most")


if __name__ == "__main__":
    main()
