"""What should a draft read next: more text of the target, the positions at which it was refused, or
its own text?

    python benchmarks/levers.py [--target T --draft DRAFT] [--rows 300] [--tokens 300k]

The target answers `--rows` instructions of its own and as many functions to complete, and reads
every answer for its distribution where a way learns by `nla`. Every way trains a copy of the draft
on as many tokens, averaged half and half with the draft it started from:

- more text: all answers, with `ce`, or with `nla` on the target's distribution at T = 0.6;
- LoRA: all answers, `ce`, adapters of rank 16 instead of all weights, not averaged;
- the same text: every second answer, `nla`;
- replay: those, and the same rows once more with loss only where the draft was refused. A drafted
  token is refused with probability 1 − Σ min(p, q), so the positions are drawn with it: reading a
  text of the target with both models is running the pair on it. Refused only: without the former;
- own text: the same text, and what the draft itself answers to its prompts, with the target's
  distribution over it (on-policy; Agarwal et al. 2023, arXiv 2306.13649; DistillSpec, 2310.08461).

Measured is the expected acceptance rate (γ = 3, T = 0.6) on the target's answers to held-out
prompts, with 95% intervals over prompts; gains are paired. The seconds of every step are printed:
they mean something on a machine that does nothing else. Finished work is kept in --work.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from alignment_data import ask, held_out, open_target, rate_gain, rounds
from objectives import _show, interval
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastdraft_hf._atomic import read_json, write_json
from fastdraft_hf._config import parse_count
from fastdraft_hf.cli.run import quiet_libraries
from fastdraft_hf.data import columns
from fastdraft_hf.data.corpus import open_completions
from fastdraft_hf.data.filters import iter_kept_rows, write_filters
from fastdraft_hf.data.sources import Source
from fastdraft_hf.data.target_logits import write_target_logits
from fastdraft_hf.data.task_sets import Decontaminator
from fastdraft_hf.draft.reduced_vocabulary import load_draft
from fastdraft_hf.eval.metrics import acceptance_rate
from fastdraft_hf.recipe import Recipe, read_recipe
from fastdraft_hf.stages.logits import open_reader
from fastdraft_hf.stages.runner import Run, execute
from fastdraft_hf.target.resolve import resolve_target, stop_ids
from fastdraft_hf.train.loop import train
from fastdraft_hf.train.section import LoraSettings

TEMPERATURE, GAMMA, ANSWER = 0.6, 3, 64
SETS = ("chat", "code")
RECIPE = Path(__file__).parents[1] / "recipes" / "smollm2-135m" / "quickstart.yaml"
# Way -> (rows, objective).
WAYS = {
    "more text, ce": ("all", "ce"),
    "LoRA, ce": ("all", "ce"),
    "more text, nla": ("all", "nla"),
    "the same text, nla": ("half", "nla"),
    "replay, nla": ("replay", "nla"),
    "refused only, nla": ("refused", "nla"),
    "own text, nla": ("own", "nla"),
}


class Timed:
    """Seconds of named steps, kept with their results."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.seconds: dict[str, float] = read_json(path) if path.exists() else {}

    def step(self, name: str, work: Any) -> None:
        if name not in self.seconds:
            start = time.monotonic()
            work()
            self.seconds[name] = time.monotonic() - start
            write_json(self._path, self.seconds)


def recipe_of(args: argparse.Namespace, seed: int, work: Path) -> Recipe:
    """Return the quickstart with sets of ``--rows``, whose distribution is read."""
    sets: dict[str, Any] = {
        "chat": {"kind": "magpie", "rows": args.rows},
        "code": {"kind": "code", "rows": args.rows},
    }
    for one in sets.values():
        one |= {"max_new_tokens": 128, "temperatures": [0.0, TEMPERATURE]}
    changes = {
        "target": args.target,
        "design.draft": str(args.draft),
        "output_dir": str(work),
        # Other text than that of the recipes the draft may have read.
        "seed": 1000 + seed,
        "max_hours": None,
        "generate.sets": sets,
        "align.max_train_tokens": args.tokens,
        "align.max_minutes": None,
    }
    if any(WAYS[name][1] != "ce" for name in args.ways):
        changes["logits"] = {"temperature": TEMPERATURE, "sets": list(SETS)}
        changes |= {"align.target_distribution": "stored", "align.temperature": TEMPERATURE}
    return read_recipe(RECIPE, [f"{key}={json.dumps(value)}" for key, value in changes.items()])


def refused(rows: datasets.Dataset, draft: Any, seed: int) -> datasets.Dataset:
    """Return the rows with labels only where the draft was refused, drawn with its probability."""
    rng = np.random.default_rng(seed)

    def labels(row: dict[str, Any]) -> dict[str, Any]:
        positions, ids, log_probs = columns.stored(row)
        own = np.full(len(row["input_ids"]), columns.IGNORED)
        if len(positions):
            with torch.inference_mode():
                logits = draft(torch.tensor([row["input_ids"]])).logits[0, positions - 1]
            q = (logits.float() / TEMPERATURE).softmax(-1).gather(1, torch.from_numpy(ids))
            accepted = np.minimum(q.numpy(), np.exp(log_probs)).sum(1)
            at = positions[rng.random(len(positions)) > accepted]
            own[at] = np.array(row["labels"])[at]
        return {"labels": own.tolist()}

    return rows.map(labels, load_from_cache_file=False)


def write_own(args: argparse.Namespace, run: Run, folder: Path, timed: Timed) -> None:
    """Have the draft answer the prompts of every second row, and the target read the answers."""
    tokenizer = AutoTokenizer.from_pretrained(run.target.path)
    for name in SETS:
        prompts = [
            tuple(row["prompt_ids"])
            for row in iter_kept_rows(run.stage_folder("generate") / name)
            if row["index"] % 2 == 0
        ]
        own = folder / "generate" / name

        def answer(own: Path = own, prompts: list[Any] = prompts) -> None:
            ask(lambda: open_target(args.draft, tokenizer), prompts, own, (TEMPERATURE,), 128)
            write_filters(own, None)

        def read(own: Path = own, name: str = name) -> None:
            assert run.recipe.logits is not None
            reader, _ = open_reader(run.target.path, run.recipe.logits, "cpu")
            write_target_logits(
                reader, own, folder / "logits" / name, top_k=32, temperature=TEMPERATURE
            )

        timed.step(f"own text, {name}: the draft writes", answer)
        timed.step(f"own text, {name}: the target reads", read)


def corpora(args: argparse.Namespace, run: Run, work: Path, seed: int, timed: Timed) -> Any:
    """Return the rows of the chosen ways, by the names in `WAYS`."""
    common: dict[str, Any] = {
        "tokenizer": AutoTokenizer.from_pretrained(run.target.path),
        "decontaminator": Decontaminator.of_task_sets(run.recipe.evaluate.tasks),
        "max_length": 512,
        "eval_rows": 0,
        "seed": seed,
    }
    sources = [Source(kind="generated", name=name) for name in SETS]

    def rows(name: str, made: Path, logits: Path | None, **keep: Any) -> datasets.Dataset:
        folder = work / f"rows-{name}"
        return open_completions(
            sources, folder=folder, generated=made, logits=logits, **keep, **common
        ).train

    logits = None if run.recipe.logits is None else run.stage_folder("logits")
    target = run.stage_folder("generate"), logits
    wanted, found = {WAYS[name][0] for name in args.ways}, {}
    if "all" in wanted:
        found["all"] = rows("all", *target)
    if wanted - {"all"}:
        found["half"] = rows("half", *target, keep=lambda index: index % 2 == 0)
    if wanted & {"replay", "refused"}:
        draft = load_draft(args.draft, dtype="float32").eval()
        found["refused"] = refused(found["half"], draft, seed)
        found["replay"] = datasets.concatenate_datasets([found["half"], found["refused"]])
    if "own" in wanted:
        write_own(args, run, work / "own", timed)
        own = rows("own", work / "own" / "generate", work / "own" / "logits")
        found["own"] = datasets.concatenate_datasets([found["half"], own])
    return found


def trained(args: argparse.Namespace, seed: int, target: Path) -> Iterator[tuple[str, Path]]:
    """Yield every way and its draft, trained where it is not yet."""
    work = args.work / f"seed-{seed}"
    recipe = recipe_of(args, seed, work / "text")
    timed = Timed(work / "seconds.json")
    work.mkdir(parents=True, exist_ok=True)
    run = Run(recipe, work / "text")
    made = ["generate"] if recipe.logits is None else ["generate", "logits"]
    execute(run, made)
    found = None
    for name in args.ways:
        folder = work / name.replace(", ", "-").replace(" ", "-")
        if not (folder / "model").exists():
            found = found or corpora(args, run, work, seed, timed)
            rows, objective = WAYS[name]
            changes: dict[str, Any] = {"objective": objective}
            if name.startswith("LoRA"):
                changes |= {"lora": LoraSettings(), "start_weight": 0.0}
            section = recipe.training_stages()["align"].model_copy(update=changes)
            data = found[rows]
            if objective == "ce":
                data = data.select_columns(["input_ids", "labels"])
            print(f"{name}: {len(data):,} rows", flush=True)

            def learn(data: Any = data, section: Any = section, folder: Path = folder) -> None:
                train(
                    args.draft,
                    folder,
                    section,
                    train_dataset=data,
                    tokenizer=AutoTokenizer.from_pretrained(target),
                    seed=seed,
                    device="cpu",
                    label=folder.name,
                )

            timed.step(name, learn)
        adapter = folder / "model" / "adapter" / "adapter_model.safetensors"
        weights = adapter if adapter.exists() else folder / "model" / "model.safetensors"
        count = sum(weight.numel() for weight in load_file(weights).values())
        print(f"{name}: {count:,} parameters trained")
        yield name, folder / "model"
    for step in made:
        record = read_json(run.stage_folder(step) / "provenance.json")
        print(f"seed {seed}, {step}: {record['wall_seconds']:.0f} s")
    for step, seconds in timed.seconds.items():
        print(f"seed {seed}, {step}: {seconds:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    base = Path(__file__).parents[1] / "model_cards" / "SmolLM2-135M-Instruct-FastDraft-Base"
    parser.add_argument("--target", default="embedded:smollm2-135m-instruct")
    parser.add_argument("--draft", type=Path, default=base, help="the draft all ways start from")
    parser.add_argument("--rows", type=int, default=300, help="of each of the two sets")
    parser.add_argument("--tokens", type=parse_count, default=300_000, help="that each way reads")
    parser.add_argument("--seeds", default="0,1", help="of text and training")
    parser.add_argument("--ways", default=";".join(WAYS), help="some of them, separated by ;")
    parser.add_argument("--prompts", type=int, default=40, help="held out, of each task set")
    parser.add_argument("--work", type=Path, default=Path("runs/levers"))
    args = parser.parse_args()
    quiet_libraries()
    args.ways = args.ways.split(";")
    if unknown := [name for name in args.ways if name not in WAYS]:
        parser.error(f"--ways: no way '{unknown[0]}'; known: {'; '.join(WAYS)}")
    args.draft = args.draft.resolve()
    folder = resolve_target(args.target).path
    ends = stop_ids(folder, AutoTokenizer.from_pretrained(folder))
    texts = held_out(folder, args.prompts, args.work, ANSWER)
    target = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def measure(path: Path, label: str) -> list[Any]:
        return rounds(target, load_draft(path, dtype="float32").eval(), texts, ends, label, ANSWER)

    before = measure(args.draft, "before")
    found: dict[str, list[Any]] = {name: [] for name in args.ways}
    for seed in map(int, args.seeds.split(",")):
        for name, path in trained(args, seed, folder):
            found[name].append(measure(path, name))
            gains = _show(interval(list(zip(found[name][-1], before, strict=True)), rate_gain))
            print(f"seed {seed}, {name}: gain {gains}", flush=True)
    tasks = [text.task for text in texts]
    names = list(dict.fromkeys(tasks))
    print(f"\n{len(texts)} prompts, {args.tokens:,} tokens read, γ = {GAMMA}, T = {TEMPERATURE}\n")
    print(f"| read | {' | '.join(names)} | gain over before | gain over {args.ways[0]} |")
    print("|" + "---|" * (len(names) + 3))
    reference = [row for one in found[args.ways[0]] for row in one]
    for name, rows in {"before": [before], **found}.items():
        cells = []
        for task in names:
            some = [r for one in rows for r, t in zip(one, tasks, strict=True) if t == task]
            cells.append(f"{acceptance_rate(some):.3f}")
        every = [row for one in rows for row in one]
        for other in (before * len(rows), reference):
            paired = len(other) == len(every)  # "before" has one seed
            pairs = list(zip(every, other, strict=True)) if paired else []
            cells.append(_show(interval(pairs, rate_gain), "+.3f") if paired else "")
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
