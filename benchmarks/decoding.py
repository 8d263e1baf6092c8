"""Compare our decoding loop with stock assisted generation, the target alone and OpenVINO GenAI.

    python benchmarks/decoding.py --draft DIR [--draft-openvino DIR] [--only pytorch,batch,…]

The draft is any PyTorch folder for the embedded target, and its int8 export for the OpenVINO rows
(`fastdraft export`). Everything runs in one process, greedily, each prompt in all ways in turn; the
first prompt warms up and is not kept. Ratios are of tokens per second over all prompts, with 95%
bootstrap intervals over prompts.

`length` compares the schedule "cost" with every fixed γ and with the target alone through the same
kernels, on code, instructions, other languages and random tokens: with PyTorch, and with OpenVINO
where there is a --draft-openvino. All that draft copy too, as they are published.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import gc
import itertools
import random
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastdraft_hf import assisted_decoding, embedded_target
from fastdraft_hf.data.prompts import chat_ids
from fastdraft_hf.decode import cached
from fastdraft_hf.decode.assisted import decode, record_decoding
from fastdraft_hf.decode.openvino.pipeline import OpenVINODecoder
from fastdraft_hf.decode.records import DecodingRecord
from fastdraft_hf.decode.settings import LOOKUP, set_draft_length
from fastdraft_hf.eval.metrics import (
    Estimate,
    block_efficiency,
    bootstrap,
    paired_ratio,
    tokens_per_second,
)
from fastdraft_hf.eval.prompts import EvaluationPrompt, draw_prompts
from fastdraft_hf.export.openvino import cached_openvino
from fastdraft_hf.hub.card import describe_machine
from fastdraft_hf.stages.provenance import machine

Way = Callable[[EvaluationPrompt], DecodingRecord]
Rows = list[tuple[str, str, str, str]]


def speed_ratio(one: list[DecodingRecord], other: list[DecodingRecord]) -> Estimate:
    return paired_ratio(list(zip(one, other, strict=True)))


def in_turn(
    ways: dict[Any, Way], prompts: list[EvaluationPrompt]
) -> dict[Any, list[DecodingRecord]]:
    """Decode every prompt but the first in every way, A B A B; return the records of each way."""
    found: dict[Any, list[DecodingRecord]] = {name: [] for name in ways}
    for way in ways.values():
        way(prompts[0])
    for prompt in prompts[1:]:
        for name, way in ways.items():
            found[name].append(way(prompt))
    return found


@contextlib.contextmanager
def timed_forward(*models: Any) -> Iterator[list[float]]:
    """Collect the seconds that the models' forward passes take."""
    spent: list[float] = []

    def wrap(forward: Any) -> Any:
        @functools.wraps(forward)
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            output = forward(*args, **kwargs)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            spent.append(time.perf_counter() - start)
            return output

        return timed

    for model in models:
        model.forward = wrap(model.forward)
    try:
        yield spent
    finally:
        for model in models:
            del model.forward


@contextlib.contextmanager
def no_collections() -> Iterator[None]:
    """Disable the garbage collector, as `timeit` does: one collection takes longer than a round."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@contextlib.contextmanager
def plain_linears() -> Iterator[None]:
    """Use PyTorch's own linear layers, to measure the loop alone."""
    kept = cached.with_skinny_linears
    cached.with_skinny_linears = lambda model: model
    try:
        yield
    finally:
        cached.with_skinny_linears = kept


def spread(estimate: Estimate, digits: int = 2) -> str:
    return f"{estimate.value:.{digits}f}x ({estimate.low:.{digits}f} to {estimate.high:.{digits}f})"


def verdict(ratio: Estimate, wanted: float) -> str:
    if ratio.low >= wanted:
        return "yes"
    return "within the spread" if ratio.high >= wanted else "no"


def compare(
    rows: Rows,
    what: str,
    found: dict[str, list[DecodingRecord]],
    ours: str,
    other: str,
    wanted: float | None,
) -> None:
    ratio = speed_ratio(found[ours], found[other])
    speeds = f"{tokens_per_second(found[ours]):.1f} / {tokens_per_second(found[other]):.1f} tok/s"
    goal = "" if wanted is None else f"≥ {wanted:g}x: {verdict(ratio, wanted)}"
    rows.append((what, spread(ratio), speeds, goal))


def pytorch(args: argparse.Namespace, rows: Rows, prompts: list[EvaluationPrompt]) -> None:
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32

    def load(path: Any) -> Any:
        return AutoModelForCausalLM.from_pretrained(path, dtype=dtype).to(args.device).eval()

    target, draft = load(embedded_target()), load(args.draft)
    outside: dict[str, list[DecodingRecord]] = {"ours": [], "stock": []}

    def way(name: str, path: Any, prompt: EvaluationPrompt) -> DecodingRecord:
        with timed_forward(target, draft) as spent, contextlib.ExitStack() as stack:
            if name == "ours, plain linears":
                stack.enter_context(plain_linears())
            stack.enter_context(no_collections())
            record = decode(
                target,
                prompt.ids,
                task=prompt.task,
                key=prompt.key,
                max_new_tokens=args.new,
                draft=None if path is None else draft,
                num_assistant_tokens=args.gamma,
                path=path or "transformers",
            )
        if name in outside:
            record_outside = dataclasses.replace(record)
            record_outside.seconds = record.seconds - sum(spent)
            outside[name].append(record_outside)
        return record

    ways = {
        "alone": None,
        "stock": "transformers",
        "ours": "ours",
        "ours, plain linears": "ours",
    }
    found = in_turn(
        {name: functools.partial(way, name, path) for name, path in ways.items()},
        prompts,
    )
    outside = {name: records[1:] for name, records in outside.items()}  # the first is the warm-up

    def per_round(records: list[DecodingRecord]) -> float:
        return sum(r.seconds for r in records) / sum(r.target_passes for r in records)

    pairs = list(zip(outside["ours"], outside["stock"], strict=True))
    share = bootstrap(
        pairs,  # type: ignore[arg-type]
        lambda chosen: per_round([a for a, _ in chosen]) / per_round([b for _, b in chosen]),  # type: ignore[misc]
    )
    goal = "≤ 0.333x: " + (
        "yes" if share.high <= 1 / 3 else "no" if share.low > 1 / 3 else "within the spread"
    )
    for name, records in outside.items():
        times = sorted(1e3 * r.seconds / r.target_passes for r in records)
        print(f"ms a round outside the passes, {name}: " + " ".join(f"{t:.2f}" for t in times))
    ms = f"{1e3 * per_round(outside['ours']):.2f} / {1e3 * per_round(outside['stock']):.2f} ms"
    rows.append(("time a round outside the passes, ours / stock", spread(share, 3), ms, goal))
    wanted = 1.5 if args.device == "cuda" else 1.15
    compare(rows, "ours / stock", found, "ours", "stock", wanted)
    compare(rows, "ours with plain linears / stock", found, "ours, plain linears", "stock", None)
    compare(rows, "stock / target alone", found, "stock", "alone", None)
    compare(rows, "ours / target alone", found, "ours", "alone", None)
    same = sum(a.tokens == b.tokens for a, b in zip(found["ours"], found["alone"], strict=True))
    rounds = sum(a.rounds == b.rounds for a, b in zip(found["ours"], found["stock"], strict=True))
    count = len(found["ours"])
    print(
        f"PyTorch: {same} of {count} answers are the target's, {rounds} of {count} records stock's"
    )
    print(f"block efficiency {block_efficiency(found['ours']):.2f} at γ = {args.gamma}")


def openvino(args: argparse.Namespace, rows: Rows, prompts: list[EvaluationPrompt]) -> None:
    from optimum.intel import OVModelForCausalLM

    folder = cached_openvino(Path(embedded_target()), "int8")
    given = {"KV_CACHE_PRECISION": args.kv_precision} if args.kv_precision else None

    def load(path: Path) -> Any:
        return OVModelForCausalLM.from_pretrained(path, ov_config=given)

    alone = load(folder)
    target, draft = load(folder), load(args.draft_openvino)
    ends = {int(alone.generation_config.eos_token_id)}
    genai = {False: OpenVINODecoder(folder), True: OpenVINODecoder(folder, args.draft_openvino)}

    def ours(gamma: int, prompt: EvaluationPrompt) -> DecodingRecord:
        return decode(
            target if gamma else alone,
            prompt.ids,
            task=prompt.task,
            key=prompt.key,
            max_new_tokens=args.new,
            draft=draft if gamma else None,
            num_assistant_tokens=gamma,
            path="ours",
        )

    def theirs(gamma: int, prompt: EvaluationPrompt) -> DecodingRecord:
        return genai[gamma > 0].decode(
            prompt.ids,
            task=prompt.task,
            key=prompt.key,
            max_new_tokens=args.new,
            stop_ids=ends,
            num_assistant_tokens=gamma,
        )

    ways: dict[str, Way] = {
        "alone": functools.partial(ours, 0),
        "GenAI alone": functools.partial(theirs, 0),
    }
    for gamma in args.openvino_gammas:
        ways[f"ours {gamma}"] = functools.partial(ours, gamma)
        ways[f"GenAI {gamma}"] = functools.partial(theirs, gamma)
    found = in_turn(ways, prompts)

    def same(kind: str, other: str) -> str:
        pairs = zip(found[kind], found[other], strict=True)
        return f"{sum(a.tokens == b.tokens for a, b in pairs)} of {len(found[kind])}"

    def best(kind: str) -> int:
        speeds = {g: tokens_per_second(found[f"{kind} {g}"]) for g in args.openvino_gammas}
        return max(speeds, key=lambda gamma: speeds[gamma])

    for gamma in args.openvino_gammas:
        own, genais = found[f"ours {gamma}"], found[f"GenAI {gamma}"]
        print(
            f"OpenVINO γ = {gamma}: ours {spread(speed_ratio(own, found['alone']))} of "
            f"OVModelForCausalLM alone, GenAI {spread(speed_ratio(genais, found['GenAI alone']))} "
            f"of GenAI alone, ours / GenAI {spread(speed_ratio(own, genais))}; block efficiency "
            f"{block_efficiency(own):.2f} and {block_efficiency(genais):.2f}"
        )
        # In int8 and bfloat16, near-ties round differently with whatever is computed together.
        print(
            f"    answers that are the target's alone: ours {same(f'ours {gamma}', 'alone')}, "
            f"GenAI's {same(f'GenAI {gamma}', 'GenAI alone')}"
        )
    mine, other = best("ours"), best("GenAI")
    name = f"OV int8, target + draft / alone, HumanEval, γ = {mine}"
    compare(rows, name, found, f"ours {mine}", "alone", 1.3)
    name = f"GenAI int8, target + draft / alone, γ = {other}"
    compare(rows, name, found, f"GenAI {other}", "GenAI alone", None)
    name = f"OVModelForCausalLM through ours (γ = {mine}) / GenAI (γ = {other})"
    compare(rows, name, found, f"ours {mine}", f"GenAI {other}", 0.9)


def batch(args: argparse.Namespace, rows: Rows, prompts: list[EvaluationPrompt]) -> None:
    """Eight prompts at once, padded left."""
    target = AutoModelForCausalLM.from_pretrained(embedded_target(), dtype=torch.float32).eval()
    draft = AutoModelForCausalLM.from_pretrained(args.draft, dtype=torch.float32).eval()
    set_draft_length(draft.generation_config, args.gamma)
    turns = itertools.cycle(prompts)
    chosen = [list(itertools.islice(turns, 8)) for _ in range(5)]  # the first warms up

    def way(assisted: bool, group: EvaluationPrompt) -> DecodingRecord:
        texts = [p.ids for p in groups[group.key]]
        length = max(map(len, texts))
        ids = torch.tensor([[0] * (length - len(t)) + list(t) for t in texts])
        mask = torch.tensor([[0] * (length - len(t)) + [1] * len(t) for t in texts])
        given: dict[str, Any] = {"max_new_tokens": args.new, "do_sample": False}
        if assisted:
            given |= {"assistant_model": draft, "custom_generate": assisted_decoding}
        with torch.inference_mode():
            start = time.perf_counter()
            output = target.generate(ids, attention_mask=mask, **given)
            seconds = time.perf_counter() - start
        tokens = []
        for row in output[:, length:].tolist():
            end = row.index(2) + 1 if 2 in row else len(row)
            tokens += row[:end]
        return DecodingRecord("batch", "batch", group.key, 0.0, 0, tokens, seconds, len(tokens))

    groups = {str(number): group for number, group in enumerate(chosen)}
    keys = [EvaluationPrompt("batch", key, ()) for key in groups]
    found = in_turn(
        {"alone": functools.partial(way, False), "ours": functools.partial(way, True)},
        keys,
    )
    compare(rows, "batch of 8, ours / target alone", found, "ours", "alone", 1.0)


LANGUAGES = (
    "用中文解释一下什么是光合作用。",
    "Schreibe einen kurzen Brief an einen Freund über das Wetter in Hamburg.",
    "Напиши короткий рассказ о старом рыбаке.",
    "日本の歴史について短く説明してください。",
)


def length(args: argparse.Namespace, rows: Rows, prompts: list[EvaluationPrompt]) -> None:
    """Length by cost; the first prompt warms up, which is also when times are learned."""
    tokenizer = AutoTokenizer.from_pretrained(embedded_target())
    chosen = draw_prompts(tokenizer, ["humaneval", "ifbench"], args.prompts // 2 + 1, 300, 0)
    few = max(1, args.prompts // 3)
    rng = random.Random(0)
    for number, text in enumerate(LANGUAGES[:few]):
        chosen.append(EvaluationPrompt("language", str(number), chat_ids(tokenizer, text)))
    for number in range(few):
        ids = tuple(rng.randrange(20, len(tokenizer)) for _ in range(100))
        chosen.append(EvaluationPrompt("random", str(number), ids))
    engines = ["PyTorch", "OV int8"] if args.draft_openvino is not None else ["PyTorch"]
    for engine in engines:
        gammas = args.length_gammas if engine == "PyTorch" else args.openvino_gammas
        length_of(engine, args, rows, chosen, gammas)
        gc.collect()


def length_of(
    engine: str,
    args: argparse.Namespace,
    rows: Rows,
    prompts: list[EvaluationPrompt],
    gammas: list[int],
) -> None:
    target: Any
    draft: Any
    if engine == "PyTorch":
        target, draft = (
            AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
            for folder in (embedded_target(), args.draft)
        )
    else:
        from optimum.intel import OVModelForCausalLM

        folders = (cached_openvino(Path(embedded_target()), "int8"), args.draft_openvino)
        target, draft = (OVModelForCausalLM.from_pretrained(f, compile=False) for f in folders)

    def way(gamma: int | None, prompt: EvaluationPrompt, new: int = args.new) -> DecodingRecord:
        set_draft_length(draft.generation_config, gamma or 0, 0 if gamma == 0 else LOOKUP)
        if gamma is None:
            draft.generation_config.num_assistant_tokens_schedule = "cost"
        ids = torch.tensor([prompt.ids])
        with torch.inference_mode(), no_collections(), record_decoding(target) as records:
            target.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new,
                do_sample=False,
                assistant_model=draft,
                custom_generate=assisted_decoding,
            )
        return dataclasses.replace(records[0], task=prompt.task, key=prompt.key)

    for gamma in range(1, 8):  # kernels are chosen, once per process, for each number of tokens
        way(gamma, prompts[0], 2 * gamma)
    ways = {gamma: functools.partial(way, gamma) for gamma in (0, *gammas, None)}
    found = in_turn(ways, prompts)
    tasks = list(dict.fromkeys(record.task for record in found[0]))

    def of(gamma: int | None, chosen: list[str]) -> list[DecodingRecord]:
        return [record for record in found[gamma] if record.task in chosen]

    def best(chosen: list[str]) -> int:
        return max((0, *gammas), key=lambda gamma: tokens_per_second(of(gamma, chosen)))

    def show(what: str, other: list[DecodingRecord], chosen: list[str], goal: float | None) -> None:
        pair = {"cost": of(None, chosen), "other": other}
        compare(rows, f"{engine}, {what}", pair, "cost", "other", goal)

    mix = ["humaneval", "ifbench"]
    show(f"mix: cost / the best γ, {best(mix)}", of(best(mix), mix), mix, 1.03)
    each = {task: best([task]) for task in tasks}
    own = [found[each[r.task]][n] for n, r in enumerate(found[0]) if r.task in mix]
    show("mix: cost / the best γ of each set", own, mix, None)
    for task in tasks:
        show(f"{task}: cost / its best γ, {each[task]}", of(each[task], [task]), [task], None)
        show(f"{task}: cost / target alone", of(0, [task]), [task], 0.97)
        rounds = [drafted for record in of(None, [task]) for drafted, _ in record.rounds]
        print(
            f"{engine}, {task}: {statistics.mean(rounds):.2f} drafted a round, none in "
            f"{rounds.count(0) / len(rounds):.0%}, block efficiency "
            f"{block_efficiency(of(None, [task])):.2f}"
        )
    same = sum(a.tokens == b.tokens for a, b in zip(found[None], found[0], strict=True))
    print(f"{engine}: {same} of {len(found[0])} texts are the target's alone")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draft", type=Path, required=True, help="the draft's PyTorch folder")
    parser.add_argument("--draft-openvino", type=Path, help="its int8 OpenVINO folder")
    parser.add_argument("--only", default="pytorch,openvino,batch")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--prompts", type=int, default=12, help="HumanEval prompts that are kept")
    parser.add_argument("--new", type=int, default=64, help="new tokens at most")
    parser.add_argument("--gamma", type=int, default=3, help="γ of the PyTorch rows")
    parser.add_argument("--openvino-gammas", type=int, nargs="+", default=[2, 3, 5])
    parser.add_argument("--length-gammas", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument(
        "--kv-precision", help="KV_CACHE_PRECISION of OVModelForCausalLM, such as bf16"
    )
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(embedded_target())
    prompts = draw_prompts(tokenizer, ["humaneval"], args.prompts + 1, 300, 0)
    rows: Rows = []
    sections = {"pytorch": pytorch, "openvino": openvino, "batch": batch, "length": length}
    for name in args.only.split(","):
        if name == "openvino" and args.draft_openvino is None:
            print("openvino: left out, there is no --draft-openvino")
            continue
        sections[name](args, rows, prompts)
    words = f"{describe_machine(machine())}, {torch.get_num_threads()} threads of PyTorch"
    print(f"\n{words}; {args.prompts} prompts, {args.new} new tokens, greedy\n")
    for what, ratio, speeds, goal in rows:
        print(f"{what:<62} {ratio:<24} {speeds:<26} {goal}")


if __name__ == "__main__":
    main()
