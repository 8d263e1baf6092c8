"""Measure what sampled softmax saves and what it costs.

    python benchmarks/sampled_softmax.py --run runs/smollm2-from-nothing [--tokens 600k]

Copies of the run's continued-pre-trained draft are aligned on the same rows in the same order with
the same token budget. They differ in how much of the vocabulary a step scores, and in whether the
layers' products are bfloat16. Then the loss on held-out rows is measured over the entire vocabulary
in float32; its difference to the first way is paired by row, with 95% bootstrap intervals over
rows. Times are of training alone.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import datasets
import torch
from objectives import _show, interval
from transformers import AutoModelForCausalLM

from fastdraft_hf._config import parse_count
from fastdraft_hf._head import head_of, last_hidden_states
from fastdraft_hf.cli.run import quiet_libraries
from fastdraft_hf.data.parts import iter_rows
from fastdraft_hf.train.config import DraftDistillationConfig
from fastdraft_hf.train.head import fused_head_loss
from fastdraft_hf.train.trainer import DraftDistillationTrainer

WAYS: dict[str, dict[str, Any]] = {
    "whole vocabulary, layers in float32": {
        "sampled_softmax": None,
        "bf16": False,
    },
    "whole vocabulary": {"sampled_softmax": None},
    "16,384 drawn": {"sampled_softmax": 16384},
    "8,192 drawn": {"sampled_softmax": 8192},
    "2,048 drawn": {"sampled_softmax": 2048},
    "512 drawn": {"sampled_softmax": 512},
}
LENGTH, ROWS = 512, 8


def rows_of(run: Path, sets: list[str]) -> list[dict[str, list[int]]]:
    """Return the sets' rows in one random order, loss on the completions."""
    rows = []
    for name in sets:
        for row in iter_rows(run / "generate" / name):
            prompt, completion = list(row["prompt_ids"]), list(row["completion_ids"])
            ids, labels = prompt + completion, [-100] * len(prompt) + completion
            rows.append({"input_ids": ids[:LENGTH], "labels": labels[:LENGTH]})
    random.Random(0).shuffle(rows)
    return rows


def train(
    draft: Path, rows: list[dict[str, list[int]]], tokens: int, settings: dict[str, Any]
) -> tuple[Any, float]:
    """Return the trained draft and the seconds that its training took."""
    with tempfile.TemporaryDirectory() as work:
        trainer = DraftDistillationTrainer(
            model=AutoModelForCausalLM.from_pretrained(draft, dtype=torch.float32),
            args=DraftDistillationConfig(
                work,
                max_train_tokens=tokens,
                max_length=LENGTH,
                per_device_train_batch_size=ROWS,
                save_strategy="no",
                disable_tqdm=True,
                seed=0,
                **settings,
            ),
            train_dataset=datasets.Dataset.from_list(rows),
        )
        start = time.monotonic()
        trainer.train()
        return trainer.model.float().eval(), time.monotonic() - start


def losses(draft: Any, rows: list[dict[str, list[int]]]) -> list[float]:
    """Return each row's mean loss in nats over the entire vocabulary, in float32."""
    found = []
    head = head_of(draft)
    with torch.no_grad():
        for row in rows:
            ids = torch.tensor([row["input_ids"]], device=draft.device)
            labels = torch.tensor(row["labels"][1:], device=draft.device)
            hidden = last_hidden_states(draft, {"input_ids": ids})[0, :-1]
            kept = labels != -100
            loss = fused_head_loss(hidden[kept], head.weight, labels[kept]).loss
            found.append(float(loss) / max(1, int(kept.sum())))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--run", type=Path, default=Path("runs/smollm2-from-nothing"))
    parser.add_argument("--sets", nargs="+", default=["code", "chat"])
    parser.add_argument("--tokens", type=parse_count, default=600_000)
    parser.add_argument("--held", type=int, default=400, help="rows held out, a tenth at most")
    parser.add_argument("--only", help="some ways, by name, separated by ';'")
    args = parser.parse_args()
    quiet_libraries()
    rows = rows_of(args.run, args.sets)
    count = min(args.held, len(rows) // 10)
    held, rows = rows[:count], rows[count:]
    print(f"{args.tokens:,} tokens; held-out loss over {len(held)} rows\n")
    print("| scored | tokens/s | held-out loss, nats | difference to the first |")
    print("|---|---|---|---|")
    first: list[float] | None = None
    for name in args.only.split(";") if args.only else WAYS:
        draft, seconds = train(args.run / "continue", rows, args.tokens, WAYS[name])
        found = losses(draft, held)
        difference = ""
        if first is None:
            first = found
        else:
            pairs = [mine - theirs for mine, theirs in zip(found, first, strict=True)]
            difference = _show(interval(pairs, statistics.mean), "+.3f")
        mean = statistics.mean(found)
        print(f"| {name} | {args.tokens / seconds:,.0f} | {mean:.3f} | {difference} |", flush=True)


if __name__ == "__main__":
    main()
