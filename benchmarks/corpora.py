"""Corpora: how fast text becomes packed ids, and how long the trainer waits for them.

    python benchmarks/corpora.py [--megabytes 24] [--rounds 3] [--steps 20]

One process, one thread. The text is what the machine has: Python source of the standard library and
of installed packages, and the packages' prose. In every round the same text goes through the
library's own path (`tokenizer(texts)`), through ours without words known before, and through all of
ours: read, decontaminated, hashed, tokenised and written as shards. MB is 10^6 bytes of UTF-8;
times are of the process, so that waiting for a disk or for another process does not count.

Then a draft of 11M parameters is trained for a few steps of 8 x 512 tokens on those shards and on a
stream of the same sources; the time the trainer spends in getting its batches is set against the
whole.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["TOKENIZERS_PARALLELISM"] = "false"

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from fastdraft_hf.cli._running import quiet_libraries
from fastdraft_hf.data.decontaminate import Decontaminator
from fastdraft_hf.data.documents import documents
from fastdraft_hf.data.encoding import DocumentEncoder, batches
from fastdraft_hf.data.mixture import (
    open_mixture,
    plan_mixture,
    tokenize_sources,
    wanted_tokens,
    write_mixture,
)
from fastdraft_hf.data.sources import Source
from fastdraft_hf.data.stream import BlockStream, as_dataset
from fastdraft_hf.data.tokenizing import tokenize_source
from fastdraft_hf.target.embedded import embedded_target
from fastdraft_hf.train.trainer import DraftDistillationConfig, DraftDistillationTrainer

KINDS = ("python", "packages", "package_docs")
ROWS, LENGTH = 8, 512


def texts_of(kind: str, size: float) -> list[str]:
    found, total = [], 0
    for text in documents(Source(kind=kind)):  # type: ignore[arg-type]
        found.append(text)
        total += len(text.encode("utf-8", "replace"))
        if total >= size:
            break
    return found


def rate(texts: list[str], work: Callable[[], Any]) -> float:
    """Return MB of text a second of this process."""
    start = time.process_time()
    work()
    seconds = time.process_time() - start
    return sum(len(t.encode("utf-8", "replace")) for t in texts) / 1e6 / seconds


def ways_of(
    texts: list[str], folder: Path, tokenizer: Any, check: Decontaminator
) -> dict[str, Callable[[], Any]]:
    """Return what is compared; ``folder`` holds the texts as files."""

    def encode() -> None:
        encoder = DocumentEncoder(tokenizer, lambda text: False)
        for batch in batches(texts):
            encoder(batch)

    def write() -> None:
        with tempfile.TemporaryDirectory() as out:
            tokenize_source(
                Source(kind="files", name=str(folder)),
                tokenizer,
                Path(out) / "shards",
                key={},
                wanted_tokens=None,
                overlaps=check.overlaps,
                processes=1,
            )

    return {
        "tokenizer(texts)": lambda: tokenizer(texts, add_special_tokens=False),
        "decontamination alone": lambda: [check.overlaps(text) for text in texts],
        "ours, ids alone": encode,
        "ours: read, decontaminated, tokenised, written": write,
    }


def tokenising(size: float, rounds: int, tokenizer: Any, check: Decontaminator) -> None:
    print("| text | MB | way | MB/s a core, median (range) |")
    print("|---|---|---|---|")
    for kind in KINDS:
        texts = texts_of(kind, size)
        raw = [text.encode("utf-8", "replace") for text in texts]
        with tempfile.TemporaryDirectory() as folder:
            for number, one in enumerate(raw):
                (Path(folder) / f"{number}.txt").write_bytes(one)
            ways = ways_of(texts, Path(folder), tokenizer, check)
            found: dict[str, list[float]] = {name: [] for name in ways}
            for number in range(rounds):
                for name, way in ways.items():
                    found[name].append(rate(texts, way))
                    line = f"round {number + 1}: {kind}: {name}: {found[name][-1]:.2f} MB/s"
                    print(line, file=sys.stderr, flush=True)
        for name, rates in found.items():
            spread = f"{statistics.median(rates):.1f} ({min(rates):.1f} to {max(rates):.1f})"
            print(f"| {kind} | {sum(map(len, raw)) / 1e6:.1f} | {name} | {spread} |")


class Waiting(DraftDistillationTrainer):
    """Notes how long it waits for its batches, and how long a step takes in all."""

    waited: list[float]
    ends: list[float]

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        found = super().get_batch_samples(*args, **kwargs)
        self.waited.append(time.perf_counter() - start)
        self.ends.append(time.perf_counter())
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
    sources = [Source(kind="python"), Source(kind="package_docs")]
    blocks = (steps + 2) * ROWS
    print("\n| data | steps | waiting for data | of the training time |")
    print("|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        stage = Path(folder)
        shards = tokenize_sources(
            sources, tokenizer, own=stage / "tokens", shared=None, generated=stage,
            overlaps=check.overlaps, held_out={}, processes=1,
            wanted_tokens=wanted_tokens(sources, blocks, 0, LENGTH),
        )  # fmt: skip
        plan, _, _ = plan_mixture(
            sources, shards, blocks=blocks, eval_blocks=0, length=LENGTH, seed=0
        )
        (stage / "data").mkdir()
        write_mixture(stage / "data", plan)
        stream = BlockStream(sources, tokenizer, overlaps=check.overlaps, length=LENGTH, seed=0)
        for name, data in (
            ("shards", open_mixture(stage / "data")),
            ("stream", as_dataset(stream)),
        ):
            arguments = DraftDistillationConfig(
                output_dir=str(stage / name),
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
                train_dataset=data,
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
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    tokenizer = AutoTokenizer.from_pretrained(embedded_target())
    check = Decontaminator.of_task_sets()
    tokenising(args.megabytes * 1e6, args.rounds, tokenizer, check)
    waiting(args.steps, tokenizer, check)


if __name__ == "__main__":
    main()
