"""Compare how fast the target generates and reads: OpenVINO and transformers.

    python benchmarks/generation.py [--only engines,logits,batches] [--target FOLDER]

The target is the embedded one by default; prompts are instructions to complete functions of the
standard library. All ways generate the same prompts in turn in one process, in alternating order;
the first round warms up and is not kept. Ratios are taken within a round and given as median, least
and greatest. `logits` reads completions through OpenVINO and through transformers in turn, and
measures the bytes per token that stored distributions take on disk. `batches` compares numbers of
completions in flight, and sampling among the most probable ids alone.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastdraft_hf.data.engines import Engine, OpenVINOEngine, Request, TransformersEngine
from fastdraft_hf.data.filters import iter_kept_rows
from fastdraft_hf.data.parts import build_requests, write_rows
from fastdraft_hf.data.prompts import chat_ids, code_instructions
from fastdraft_hf.data.target_logits import LogitsReader, ModelReader, write_target_logits
from fastdraft_hf.decode.openvino.paged import OpenVINOReader
from fastdraft_hf.export.openvino import cached_openvino
from fastdraft_hf.hub.card import describe_machine
from fastdraft_hf.stages.provenance import machine
from fastdraft_hf.target.resolve import resolve_target, stop_ids
from fastdraft_hf.train.config import has_fast_bf16

Rows = list[tuple[str, str, str, str]]


@dataclass
class Round:
    """Rows, tokens and seconds of one way in one round."""

    seconds: float
    texts: int
    tokens: int
    ids: dict[int, tuple[int, ...]]


def write(engine: Engine, requests: Sequence[Request]) -> Round:
    start = time.perf_counter()
    ids = {c.request.index: c.ids for c in engine.generate(requests, lambda tokens: None)}
    seconds = time.perf_counter() - start
    return Round(seconds, len(ids), sum(map(len, ids.values())), ids)


def in_turn(
    ways: dict[str, Engine], requests: Sequence[Request], rounds: int
) -> dict[str, list[Round]]:
    """Let all ways generate the requests, A B, B A, A B; return the rounds after the first."""
    found: dict[str, list[Round]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        names = list(ways) if number % 2 == 0 else list(ways)[::-1]
        for name in names:
            done = write(ways[name], requests)
            label = "warm-up" if number == 0 else f"round {number}"
            print(
                f"{label}: {name}: {done.texts / done.seconds:.2f} rows/s, "
                f"{done.tokens / done.seconds:.0f} tokens/s",
                file=sys.stderr,
                flush=True,
            )
            if number:
                found[name].append(done)
    return found


def rates(rounds: list[Round], what: str) -> list[float]:
    return [getattr(one, what) / one.seconds for one in rounds]


def compare(ours: list[Round], other: list[Round], what: str) -> tuple[float, float, float]:
    """Return median, least and greatest ratio of rates, taken within each round."""
    pairs = zip(rates(ours, what), rates(other, what), strict=True)
    ratios = [a / b for a, b in pairs]
    return statistics.median(ratios), min(ratios), max(ratios)


def spread(ratio: tuple[float, float, float]) -> str:
    return f"{ratio[0]:.2f}x ({ratio[1]:.2f} to {ratio[2]:.2f})"


def pair(ours: list[Round], other: list[Round], what: str, unit: str) -> str:
    a, b = (statistics.median(rates(rounds, what)) for rounds in (ours, other))
    return f"{a:.2f} / {b:.2f} {unit}"


def verdict(ratio: tuple[float, float, float], wanted: float) -> str:
    if ratio[1] >= wanted:
        return f"≥ {wanted:g}x: yes"
    return f"≥ {wanted:g}x: " + ("within the spread" if ratio[2] >= wanted else "no")


def make_requests(args: argparse.Namespace, count: int) -> Sequence[Request]:
    tokenizer = AutoTokenizer.from_pretrained(args.target)
    prompts: list[tuple[int, ...]] = []
    for text in code_instructions(0):
        chat = tokenizer.chat_template is not None
        ids = chat_ids(tokenizer, text) if chat else tuple(tokenizer(text)["input_ids"])
        if len(ids) <= args.prompt:
            prompts.append(ids)
        if len(prompts) == count:
            break
    return build_requests(
        prompts,
        temperatures=[args.temperature],
        max_new_tokens=args.new,
        seed=0,
        source="benchmark",
    )


def engines(args: argparse.Namespace, rows: Rows) -> None:
    target, ends = args.target, args.ends
    requests = make_requests(args, args.prompts)
    ways: dict[str, Engine] = {
        "openvino int8": OpenVINOEngine(cached_openvino(target, "int8"), ends, args.prompts),
        "transformers fp32": TransformersEngine(target, ends, args.prompts),
    }
    found = in_turn(ways, requests, args.rounds)
    ours, theirs = found.values()
    name = f"{args.prompts} prompts, openvino int8 / transformers fp32"
    ratio = compare(ours, theirs, "texts")
    rows.append(
        (f"{name}, rows", spread(ratio), pair(ours, theirs, "texts", "rows/s"), verdict(ratio, 5))
    )
    ratio = compare(ours, theirs, "tokens")
    rows.append((f"{name}, tokens", spread(ratio), pair(ours, theirs, "tokens", "tok/s"), ""))


class TopKEngine(OpenVINOEngine):
    """Samples among the ``top_k`` most probable ids."""

    top_k = 4096

    def _config(self, request: Request) -> Any:
        config = super()._config(request)
        if config.do_sample:
            config.top_k = self.top_k
        return config


def batches(args: argparse.Namespace, rows: Rows) -> None:
    requests = make_requests(args, args.prompts)
    folder = cached_openvino(args.target, "int8")
    ways: dict[str, Engine] = {}
    for size in args.sizes:
        ways[f"{size} in flight"] = OpenVINOEngine(folder, args.ends, size)
    name = f"{size} in flight, the {TopKEngine.top_k:,} most probable ids"
    ways[name] = TopKEngine(folder, args.ends, size)
    found = in_turn(ways, requests, args.rounds)
    base, *others = found
    for other in others:
        ratio = spread(compare(found[other], found[base], "tokens"))
        speeds = pair(found[other], found[base], "tokens", "tok/s")
        rows.append((f"{other} / {base}", ratio, speeds, ""))


def logits(args: argparse.Namespace, rows: Rows) -> None:
    target = args.target
    kind = torch.bfloat16 if has_fast_bf16("cpu") else torch.float32
    model = AutoModelForCausalLM.from_pretrained(target, dtype=kind).eval()
    readers: dict[str, LogitsReader] = {
        "openvino": OpenVINOReader(cached_openvino(target, "fp16")),
        "transformers": ModelReader(model),
    }
    found: dict[str, list[Round]] = {name: [] for name in readers}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        engine = OpenVINOEngine(cached_openvino(target, "int8"), args.ends, 16)
        write_rows(engine, make_requests(args, args.logits_rows), folder / "rows")
        texts = list(iter_kept_rows(folder / "rows"))
        tokens = sum(len(row["completion_ids"]) for row in texts)
        for number in range(args.rounds + 1):
            names = list(readers) if number % 2 == 0 else list(readers)[::-1]
            for name in names:
                shutil.rmtree(folder / name, ignore_errors=True)
                start = time.perf_counter()
                write_target_logits(
                    readers[name], folder / "rows", folder / name, top_k=32, temperature=1.0
                )
                seconds = time.perf_counter() - start
                print(f"round {number}: {name}: {tokens / seconds:.0f} tokens/s", file=sys.stderr)
                if number:
                    found[name].append(Round(seconds, len(texts), tokens, {}))
        size = sum(path.stat().st_size for path in (folder / "transformers").iterdir())
    ours, other = found["openvino"], found["transformers"]
    ratio = spread(compare(ours, other, "tokens"))
    what = f"logits: openvino fp16 / transformers {str(kind).removeprefix('torch.')}"
    rows.append((what, ratio, pair(ours, other, "tokens", "tok/s"), "prompts read, not counted"))
    bytes_a_token = size / tokens
    goal = "≤ 200: " + ("yes" if bytes_a_token <= 200 else "no")
    what = f"stored logits on disk, k = 32, {tokens:,} tokens"
    rows.append((what, f"{bytes_a_token:.1f} bytes per token", f"{size:,} bytes", goal))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="engines,logits")
    parser.add_argument("--target", default="embedded:smollm2-135m-instruct")
    parser.add_argument("--prompts", type=int, default=64, help="of engines, all at once")
    parser.add_argument("--sizes", type=int, nargs="+", default=[16, 32, 64], help="of batches")
    parser.add_argument("--logits-rows", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=200, help="longest prompt, in tokens")
    parser.add_argument("--new", type=int, default=64, help="new tokens at most")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    sections: dict[str, Any] = {"engines": engines, "logits": logits, "batches": batches}
    wanted = args.only.split(",")
    for name in wanted:
        if name not in sections:
            parser.error(f"--only: {name} is none of {', '.join(sections)}")
    args.target = resolve_target(args.target).path
    args.ends = stop_ids(args.target, AutoTokenizer.from_pretrained(args.target))
    rows: Rows = []
    for name in wanted:
        sections[name](args, rows)
    words = f"{describe_machine(machine())}, {torch.get_num_threads()} threads of PyTorch"
    print(f"\n{words}; {args.new} new tokens at most, temperature {args.temperature:g}\n")
    for what, ratio, speeds, goal in rows:
        print(f"{what:<66} {ratio:<24} {speeds:<26} {goal}")


if __name__ == "__main__":
    main()
