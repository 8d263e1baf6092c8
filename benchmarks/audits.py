"""`fastdraft audit` on every engine: is what it samples with a draft the target's own?

    python benchmarks/audits.py [--engines vllm,llama.cpp] [--distance 0.02]

vLLM and llama.cpp are started in float32 on loopback (`engine_servers`), with the draft and
without; llama.cpp also with `--spec-draft-sampling probabilistic`, which its default, greedy
drafts, is not. The exit status is 1 if an engine is inexact.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from engine_servers import PACKAGES, Server

from fastdraft_hf.cli.main import main as fastdraft
from fastdraft_hf.eval.config import AUDITED
from fastdraft_hf.target.resolve import resolve_target

# Another way to draft with an engine: its name, and words of its command line.
WAYS: dict[str, list[tuple[str, ...]]] = {
    "llama.cpp": [(), ("--spec-draft-sampling", "probabilistic")]
}
# llama.cpp answers as many requests at once; vLLM takes what comes.
MORE = {"llama.cpp": ("-np", "8")}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--target", default="embedded:smollm2-135m-instruct")
    shipped = Path(__file__).parents[1] / "model_cards" / "SmolLM2-135M-Instruct-FastDraft"
    parser.add_argument("--draft", type=Path, default=shipped)
    parser.add_argument("--engines", default=",".join(AUDITED), help="some of them")
    parser.add_argument("--gamma", type=int, default=3, help="drafted tokens per round")
    parser.add_argument("--distance", default="0.02", help="total variation to find")
    parser.add_argument("--work", type=Path, default=Path("runs/audits"))
    args = parser.parse_args()
    engines = args.engines.split(",")
    if unknown := [name for name in engines if name not in AUDITED]:
        parser.error(f"--engines: no engine {unknown[0]}; known: {', '.join(AUDITED)}")
    args.work.mkdir(parents=True, exist_ok=True)
    target, draft = resolve_target(args.target).path, args.draft.resolve()
    words = ["audit", "--target", str(target), "--draft", str(draft), "--distance", args.distance]
    words += ["--num-assistant-tokens", str(args.gamma)]
    inexact = 0
    for engine in engines:
        for way in WAYS.get(engine, [()]):
            print(f"\n{' '.join((engine, *way))} {' '.join(PACKAGES.get(engine, ()))}", flush=True)
            if engine not in PACKAGES:
                inexact += fastdraft([*words, "--engine", engine]) != 0
                continue
            # One after the other: only one is asked at a time.
            for option, used in (("--server-alone", None), ("--server", draft)):
                if way and used is None:
                    continue
                log = args.work / f"{engine}{option}.log"
                options = (*MORE.get(engine, ()), *(way if used else ()))
                with Server(
                    engine, target, used, args.gamma, exact=True, log=log, options=options
                ) as server:
                    urls = [option, server.client.url]
                    inexact += fastdraft([*words, "--engine", engine, *urls]) != 0
    return int(inexact > 0)


if __name__ == "__main__":
    sys.exit(main())
