"""Compare a draft aligned on the target's completions with one aligned on a dataset's own answers.

    python benchmarks/alignment_data.py --draft runs/smollm2-from-nothing/continue \\
        [--functions 1500] [--tokens 300k] [--work runs/alignment-data]

FastDraft (arXiv 2411.11055) found that the target's completions are better on every task. The
dataset here is the Python standard library: a function's signature and docstring are the prompt
("complete this function", as in HumanEval), and its body is the dataset's own answer, in the form
the target answers in.

Two drafts start from --draft, one aligned on the target's completions and one on the library's
answers: the same prompts in the same order, steps, seed and settings. Of each pair of answers the
longer one is cut to the length of the shorter, so that every step has the same number of tokens.
Functions that share 13 words with HumanEval, IFBench or the held-out functions are left out.

Measured on the target's completions at T = 0.6 of HumanEval prompts and of held-out functions: the
expected, teacher-forced acceptance rate and block efficiency (`fastdraft_hf.eval.expected`), with
95% bootstrap intervals over prompts; the difference of the drafts is paired by prompt. Finished
work is kept in --work, and a killed run resumes.
"""

from __future__ import annotations

import argparse
import json
import random
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
from objectives import _show, interval
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastdraft_hf._atomic import write_json
from fastdraft_hf._config import parse_count
from fastdraft_hf._progress import Progress
from fastdraft_hf.cli.run import quiet_libraries
from fastdraft_hf.data.columns import IGNORED
from fastdraft_hf.data.engines import Engine
from fastdraft_hf.data.filters import KEPT, judge_rows
from fastdraft_hf.data.installed import documented_functions
from fastdraft_hf.data.parts import build_requests, iter_rows, stored_indices, write_rows
from fastdraft_hf.data.prompts import CODE_INSTRUCTION, chat_ids
from fastdraft_hf.data.task_sets import Decontaminator
from fastdraft_hf.eval.expected import (
    Continuation,
    ExpectedRounds,
    expected_rounds,
    text_acceptance,
)
from fastdraft_hf.eval.metrics import acceptance_rate, block_efficiency
from fastdraft_hf.eval.prompts import draw_prompts
from fastdraft_hf.stages.generate import load_engine
from fastdraft_hf.target.resolve import resolve_target, stop_ids
from fastdraft_hf.train.loop import train
from fastdraft_hf.train.section import training_section

TARGET = "embedded:smollm2-135m-instruct"
TEMPERATURE, GAMMA, ANSWER = 0.6, 3, 96
TEMPERATURES = (0.0, 0.6, 0.8, 1.0)
STDLIB, HUMANEVAL = "standard library", "humaneval"


@dataclass(frozen=True)
class Function:
    """A documented function: the prompt and the library's own answer."""

    head: str
    whole: str

    @property
    def instruction(self) -> str:
        return CODE_INSTRUCTION.format(self.head.rstrip())

    @property
    def answer(self) -> str:
        return f"```python\n{self.whole.rstrip()}\n```"


def functions(longest: int = 3000) -> list[Function]:
    """Return the documented functions of the standard library, each signature once, sorted."""
    found: dict[str, Function] = {}
    for node, lines in documented_functions():
        first, docstring, last = node.lineno - 1, node.body[0].end_lineno, node.end_lineno
        head = textwrap.dedent("\n".join(lines[first:docstring]))
        whole = textwrap.dedent("\n".join(lines[first:last]))
        if 60 <= len(head) <= 900 and len(whole) <= longest:
            found.setdefault(head, Function(head, whole))
    return [found[head] for head in sorted(found)]


def split(held_out: int, count: int, seed: int) -> tuple[list[Function], list[Function]]:
    """Return held-out functions, and functions to train on that overlap no evaluation text."""
    clean = Decontaminator.of_task_sets()
    every = functions()
    random.Random(seed).shuffle(every)
    measured = every[:held_out]
    near = Decontaminator([f.head for f in measured] + [f.whole for f in measured])
    trained = [
        f
        for f in every[held_out:]
        if not any(d.overlaps(f.instruction + "\n" + f.whole) for d in (clean, near))
    ]
    return measured, trained[:count]


def open_target(folder: Path, tokenizer: Any) -> Engine:
    return load_engine("auto", folder, stop_ids(folder, tokenizer), 48)


def ask(
    engine: Callable[[], Engine],
    prompts: list[tuple[int, ...]],
    folder: Path,
    temperatures: tuple[float, ...],
    longest: int,
) -> list[dict[str, Any]]:
    """Let the target answer; answers already in ``folder`` are kept."""
    requests = build_requests(
        prompts, temperatures=temperatures, max_new_tokens=longest, seed=0, source=folder.name
    )
    if len(stored_indices(folder)) < len(requests):
        write_rows(engine(), requests, folder)
    return list(iter_rows(folder))


def held_out(folder: Path, prompts: int, work: Path, longest: int) -> list[Continuation]:
    """Return the target's completions of held-out prompts of HumanEval and IFBench at T = 0.6."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    drawn = draw_prompts(tokenizer, [HUMANEVAL, "ifbench"], prompts, 400, 0)
    return continuations(
        lambda: open_target(folder, tokenizer),
        [(prompt.task, prompt.ids) for prompt in drawn],
        work / f"held-out-{prompts}",
        longest,
    )


def continuations(
    engine: Callable[[], Engine],
    prompts: list[tuple[str, tuple[int, ...]]],
    folder: Path,
    longest: int,
) -> list[Continuation]:
    """Return the target's completions of prompts (task, ids) at T = 0.6, kept in ``folder``."""
    rows = ask(engine, [ids for _, ids in prompts], folder, (TEMPERATURE,), longest)
    return [
        Continuation(
            prompts[row["index"]][0], tuple(row["prompt_ids"]), tuple(row["completion_ids"])
        )
        for row in rows
    ]


def pairs(
    rows: list[dict[str, Any]], trained: list[Function], tokenizer: Any, length: int
) -> tuple[list[dict[str, list[int]]], list[dict[str, list[int]]]]:
    """Return examples of the target's and the library's answers, equally long in each pair."""
    judged = zip(rows, judge_rows(rows), strict=True)
    kept = [row for row, (_, reason) in judged if reason == KEPT]
    clean = Decontaminator.of_task_sets()
    target_written, own = [], []
    for row in kept:
        prompt, written = row["prompt_ids"], row["completion_ids"]
        if clean.overlaps(tokenizer.decode(written)):
            continue
        real = tokenizer(trained[row["index"]].answer, add_special_tokens=False)["input_ids"]
        real = [*real, tokenizer.eos_token_id]
        both = min(len(written), len(real), length - len(prompt))
        if both < 1:
            continue
        for answer, examples in ((written, target_written), (real, own)):
            labels = [IGNORED] * len(prompt) + answer[:both]
            examples.append({"input_ids": prompt + answer[:both], "labels": labels})
    return target_written, own


def align(
    examples: list[dict[str, list[int]]], start: Path, tokenizer: Any, work: Path, config: Any
) -> dict[str, Any]:
    """Train a copy of the draft; return steps and tokens."""
    facts = work / "facts.json"
    if not facts.exists():
        found = train(
            start,
            work,
            config,
            train_dataset=datasets.Dataset.from_list(examples),
            tokenizer=tokenizer,
            seed=0,
            device="cpu",
            label=work.name,
        )
        found.pop("log")
        write_json(facts, found)
    return dict(json.loads(facts.read_text(encoding="utf-8")))


def rounds(
    target: Any,
    draft: Any,
    texts: list[Continuation],
    ends: set[int],
    label: str,
    longest: int = ANSWER,
) -> list[ExpectedRounds]:
    """Return the expected counts of decoding each text."""
    found = []
    with Progress(f"{label}: acceptance", len(texts), "answers") as progress:
        for text in texts:
            read = text_acceptance(target, draft, text, TEMPERATURE, ends)
            found.append(expected_rounds(read, GAMMA, longest))
            progress.advance(1)
    return found


def rate_gain(pairs: list[Any]) -> float:
    return acceptance_rate([a for a, _ in pairs]) - acceptance_rate([b for _, b in pairs])


def table(found: dict[str, list[ExpectedRounds]], tasks: list[str]) -> str:
    """Return the result as a table with a row for each draft and a column for each prompt set."""
    start, own, written = found
    lines = []
    for task in (HUMANEVAL, STDLIB):
        chosen = [i for i, name in enumerate(tasks) if name == task]
        part = {name: [parts[i] for i in chosen] for name, parts in found.items()}
        lines += [
            f"{task}, {len(chosen)} prompts, γ = {GAMMA}, T = {TEMPERATURE}:\n",
            "| draft | expected acceptance rate | block efficiency | gain over own answers |",
            "|---|---|---|---|",
        ]
        for name in (start, own, written):
            gain = ""
            if name == written:
                both = list(zip(part[written], part[own], strict=True))
                gain = _show(interval(both, rate_gain), "+.3f")
            lines.append(
                f"| {name} | {_show(interval(part[name], acceptance_rate))} | "
                f"{_show(interval(part[name], block_efficiency), '.2f')} | {gain} |"
            )
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--draft", type=Path, required=True, help="the draft both start from")
    parser.add_argument("--work", type=Path, default=Path("runs/alignment-data"))
    parser.add_argument("--functions", type=parse_count, default=1500, help="prompts to train on")
    parser.add_argument("--answer-tokens", type=int, default=256, help="longest answer trained on")
    parser.add_argument("--tokens", type=parse_count, default=300_000, help="of each alignment")
    parser.add_argument("--batch-size", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=60, help="measured, of each set")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    quiet_libraries()
    recorded, draft = args.work / "draft.json", str(args.draft.resolve())
    if recorded.exists() and json.loads(recorded.read_text(encoding="utf-8")) != draft:
        parser.error(f"{args.work} was started with another --draft; give another --work")
    write_json(recorded, draft)
    folder = resolve_target(TARGET).path
    tokenizer = AutoTokenizer.from_pretrained(folder)
    opened: list[Engine] = []

    def engine() -> Engine:
        if not opened:
            opened.append(open_target(folder, tokenizer))
        return opened[0]

    # Held out by number, so that --prompts does not change the training rows.
    measured, trained = split(200, args.functions, args.seed)
    prompts = [chat_ids(tokenizer, f.instruction) for f in trained]
    name = f"target-answers-{args.functions}-{args.answer_tokens}-{args.seed}"
    rows = ask(engine, prompts, args.work / name, TEMPERATURES, args.answer_tokens)
    length = 512
    written, own = pairs(rows, trained, tokenizer, length)
    count = sum(len(e["input_ids"]) for e in written)
    print(f"{len(written):,} pairs of {len(rows):,} rows, {count:,} tokens each way")

    config = training_section()(
        max_train_tokens=args.tokens,
        max_length=length,
        per_device_train_batch_size=args.batch_size,
        objective="ce",
        eval_rows=0,
        logging_steps=20,
        save_steps=200,
    )
    size = f"{args.functions}-{args.answer_tokens}-{args.tokens}-{args.batch_size}-{args.seed}"
    drafts = {"start": args.draft}
    counts = {}
    for label, key, examples in (
        ("aligned on the dataset's own answers", "own", own),
        ("aligned on the target's answers", "written", written),
    ):
        work = args.work / f"{key}-{size}"
        facts = align(examples, args.draft, tokenizer, work, config)
        drafts[label], counts[label] = work / "model", (facts["steps"], facts["tokens"])
    if len(set(counts.values())) != 1:
        raise RuntimeError(f"the two trainings differ in steps or tokens: {counts}")
    steps, tokens = next(iter(counts.values()))

    code = [
        (STDLIB, ids)
        for ids in (chat_ids(tokenizer, f.instruction) for f in measured)
        if len(ids) <= 400
    ][: args.prompts]
    prompts_held_out = [
        *((HUMANEVAL, p.ids) for p in draw_prompts(tokenizer, [HUMANEVAL], args.prompts, 400, 0)),
        *code,
    ]
    kept = args.work / f"held-out-answers-{args.prompts}-{args.seed}"
    texts = continuations(engine, prompts_held_out, kept, ANSWER)
    opened.clear()
    target = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ends = stop_ids(folder, tokenizer)
    found = {}
    for label, path in drafts.items():
        draft = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        found[label] = rounds(target, draft, texts, ends, label)
    print(f"\n{len(written):,} prompts; {tokens:,} tokens in {steps:,} steps each\n")
    print(table(found, [text.task for text in texts]))


if __name__ == "__main__":
    main()
