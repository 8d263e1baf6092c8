"""How fast text becomes packed blocks, and how long the trainer waits for them.

    python benchmarks/corpora.py [--megabytes 24] [--rounds 3] [--steps 20]

The text is what the machine has: Python source of the standard library and of installed packages,
and the packages' prose. MB is 10^6 bytes of UTF-8, times are wall clock. Then a draft of 11M
parameters is trained for a few steps of 8 x 512 tokens on written blocks and on a stream of those
sources, and the time the trainer spends in getting its batches is set against the whole.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from fastdraft_hf.cli.run import quiet_libraries
from fastdraft_hf.data.corpus import open_corpus
from fastdraft_hf.data.packing import Encoder
from fastdraft_hf.data.sources import Documents, Source
from fastdraft_hf.data.task_sets import Decontaminator
from fastdraft_hf.target.embedded import embedded_target
from fastdraft_hf.train.trainer import DraftDistillationConfig, DraftDistillationTrainer

KINDS = ("python", "packages", "package_docs")
ROWS, LENGTH = 8, 512


def texts_of(kind: str, size: float) -> list[str]:
    found, total = [], 0
    for text in Documents(Source(kind=kind)):  # type: ignore[arg-type]
        found.append(str(text))
        total += len(found[-1].encode("utf-8", "replace"))
        if total >= size:
            break
    return found


def batches(texts: list[str]) -> Iterator[list[str]]:
    rest = iter(texts)
    while batch := list(islice(rest, 64)):
        yield batch


def encoding(megabytes: float, rounds: int, tokenizer: Any, check: Decontaminator) -> None:
    ways: dict[str, Callable[[list[str]], Any]] = {
        "tokenizer(texts)": lambda texts: tokenizer(texts, add_special_tokens=False),
        "Encoder": Encoder(tokenizer),
        "Encoder, decontaminated": Encoder(tokenizer, check),
    }
    print("| text | MB | way | MB per second, median (range) |\n|---|---|---|---|")
    for kind in KINDS:
        texts = texts_of(kind, megabytes * 1e6)
        size = sum(len(t.encode("utf-8", "replace")) for t in texts) / 1e6
        rates: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(rounds):
            for name, way in ways.items():
                start = time.perf_counter()
                for batch in batches(texts):
                    way(batch)
                rates[name].append(size / (time.perf_counter() - start))
        for name, found in rates.items():
            spread = f"{statistics.median(found):.1f} ({min(found):.1f} to {max(found):.1f})"
            print(f"| {kind} | {size:.1f} | {name} | {spread} |")


class Waiting(DraftDistillationTrainer):
    """Record how long the trainer waits for its batches, and when it has each."""

    waited: list[float]
    ends: list[float]

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        found = super().get_batch_samples(*args, **kwargs)
        self.ends.append(time.perf_counter())
        self.waited.append(self.ends[-1] - start)
        return found


def make_draft(tokenizer: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=192,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=3,
            num_key_value_heads=3,
            tie_word_embeddings=True,
        )
    )


def waiting(steps: int, tokenizer: Any, check: Decontaminator) -> None:
    print("\n| data | steps | waiting for data | of the training time |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for name in ("blocks", "stream"):
            corpus = open_corpus(
                [Source(kind="python"), Source(kind="package_docs")],
                tokenizer,
                folder=Path(folder) / name,
                tokens=(steps + 2) * ROWS * LENGTH,
                max_length=LENGTH,
                eval_rows=0,
                seed=0,
                generated=Path(folder),
                decontaminator=check,
                streaming=name == "stream",
            )
            arguments = DraftDistillationConfig(
                output_dir=str(Path(folder) / f"run-{name}"),
                max_steps=steps + 1,
                per_device_train_batch_size=ROWS,
                dataset_kwargs={"skip_prepare_dataset": True},
                max_length=LENGTH,
                save_strategy="no",
                report_to="none",
                logging_steps=1000,
                disable_tqdm=True,
                use_cpu=not torch.cuda.is_available(),
            )
            trainer = Waiting(
                model=make_draft(tokenizer),
                args=arguments,
                train_dataset=corpus.train,
                processing_class=tokenizer,
            )
            trainer.waited, trainer.ends = [], []
            trainer.train()
            # The first step warms up; a stream makes its first window in it.
            first, waited = trainer.waited[0], sum(trainer.waited[1:])
            whole = trainer.ends[-1] - trainer.ends[0]
            print(
                f"| {name} | {steps} | {waited:.3f} s (before the first step {first:.2f} s) | "
                f"{waited / whole:.2%} |"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--megabytes", type=float, default=24, help="of text of each kind")
    parser.add_argument("--rounds", type=int, default=3, help="times every way is run")
    parser.add_argument("--steps", type=int, default=20, help="training steps")
    args = parser.parse_args()
    quiet_libraries()
    tokenizer = AutoTokenizer.from_pretrained(embedded_target())
    check = Decontaminator.of_task_sets()
    encoding(args.megabytes, args.rounds, tokenizer, check)
    waiting(args.steps, tokenizer, check)


if __name__ == "__main__":
    main()
