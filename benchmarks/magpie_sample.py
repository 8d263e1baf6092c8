"""Magpie on the embedded target: how much is kept, why the rest goes, and what it reads like.

    python benchmarks/magpie_sample.py [--rows 1000] [--work runs/magpie] [--write]

Runs stage `generate` of a recipe with one magpie set, English asked for. Prints how many of the
instructions and answers are kept and why the others are not, and with --write puts that and 20
kept pairs, drawn by a seed, into docs/magpie-sample.md. A killed run goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from fastdraft_hf._config import parse_count
from fastdraft_hf.cli._running import quiet_libraries
from fastdraft_hf.data.dataset_card import fenced
from fastdraft_hf.data.filters import KEPT, read_kept_rows
from fastdraft_hf.data.prompts import template_ends
from fastdraft_hf.recipe import build_recipe
from fastdraft_hf.stages.runner import Run, choose, execute

DOCS = Path(__file__).parents[1] / "docs" / "magpie-sample.md"
PAIRS, TOP_P = 20, 0.95


def write_set(work: Path, rows: int, batch_size: int) -> Run:
    """Run stage generate; return the run."""
    recipe = build_recipe(
        {
            "target": "embedded:smollm2-135m-instruct",
            "output_dir": str(work),
            "generate": {
                "batch_size": batch_size,
                "sets": {
                    "chat": {
                        "kind": "magpie",
                        "rows": rows,
                        # So small a target writes nonsense from its whole vocabulary.
                        "top_p": TOP_P,
                        "filters": {"language": "en"},
                    }
                },
            },
        }
    )
    run = Run(recipe, work)
    execute(run, choose(recipe, ["generate"]))
    return run


def shares(title: str, counts: Mapping[str, int]) -> str:
    """Return a table of counts and their share."""
    total = sum(counts.values())
    lines = [f"| {title} | count | share |", "|---|---|---|"]
    lines += [f"| {name} | {n:,} | {n / max(1, total):.1%} |" for name, n in counts.items()]
    return "\n".join([*lines, f"| all | {total:,} | |"])


def pairs(run: Run, count: int) -> list[dict[str, Any]]:
    """Return kept pairs as text, drawn by a seed."""
    tokenizer = AutoTokenizer.from_pretrained(run.target.path)
    prefix, suffix = template_ends(tokenizer)
    rows, _ = read_kept_rows(run.stage_folder("generate") / "chat")
    drawn = random.Random(0).sample(rows, min(count, len(rows)))
    return [
        {
            "instruction": tokenizer.decode(row["prompt_ids"][len(prefix) : -len(suffix)]),
            "answer": tokenizer.decode(row["completion_ids"], skip_special_tokens=True),
            "temperature": row["temperature"],
            "cut": row["finish_reason"] == "length",
        }
        for row in drawn
    ]


def report(run: Run) -> str:
    """Return the page: settings, counts and pairs."""
    folder = run.stage_folder("generate")
    facts = json.loads((folder / "provenance.json").read_text(encoding="utf-8"))
    made = facts["facts"]["sets"]["chat"]
    assert run.recipe.generate is not None
    wanted = run.recipe.generate.sets["chat"]
    asked = sum(made["instructions"].values())
    kept = made["filter"][KEPT]
    parts = [
        "# A sample of Magpie",
        "The embedded target (SmolLM2-135M-Instruct, 135 million parameters) is given its chat "
        "template up to the user's turn, writes an instruction, and then answers it. Written by "
        f"`python benchmarks/magpie_sample.py --rows {asked} --write`; "
        f"engine {facts['facts']['engine']}, "
        f"instructions at temperatures {_list(wanted.instruction_temperatures)} and top-p "
        f"{wanted.instruction_top_p:g}, answers at {_list(wanted.temperatures)} and top-p "
        f"{wanted.top_p:g}, at most "
        f"{wanted.max_new_tokens} tokens, `filters: {{language: en}}`.",
        f"Of {asked:,} instructions asked for, {kept:,} became a pair that training reads "
        f"({kept / max(1, asked):.1%}). [generate](generate.md#filters) explains the reasons.",
        shares("instructions", made["instructions"]),
        shares("answers", made["filter"]),
        f"## {PAIRS} kept pairs",
        "Drawn with a fixed seed from the kept ones and shown as they are, not chosen. A model of "
        "this size invents facts: what counts here is that the text is the target's own.",
    ]
    for number, pair in enumerate(pairs(run, PAIRS), 1):
        end = ", cut off at the length limit" if pair["cut"] else ""
        parts += [
            f"### {number}",
            fenced(pair["instruction"].strip()),
            f"Answer, temperature {pair['temperature']:.2g}{end}:",
            fenced(pair["answer"].strip()),
        ]
    return "\n\n".join(parts) + "\n"


def _list(values: list[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=parse_count, default=1000, help="instructions to write")
    parser.add_argument("--work", type=Path, default=Path("runs/magpie"))
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--write", action="store_true", help=f"write {DOCS.name}")
    args = parser.parse_args()
    quiet_libraries()
    text = report(write_set(args.work, args.rows, args.batch_size))
    print(text.split(f"## {PAIRS}")[0])
    if args.write:
        DOCS.write_text(text, encoding="utf-8")
        print(f"written: {DOCS}")


if __name__ == "__main__":
    main()
