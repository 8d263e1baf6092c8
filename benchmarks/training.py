"""Compare training a draft: our trainer, TRL's, plain PyTorch, and our objectives besides ce.

    python benchmarks/training.py [--rounds 3] [--steps 3] [--skip-memory]

The same draft of 11M parameters (vocabulary 49,152, 8 rows of 512 tokens per step, AdamW, no
gradient checkpointing) is trained by all ways in turn, round after round, in one process; ratios
are taken within a round. A step is timed from the end of one to the end of the next, data loading
included. The loss's memory is measured in a process of its own for each way: how far the peak
exceeds what model and inputs take. On a GPU the draft has 50M parameters in bfloat16.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import datasets
import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast, TrainerCallback
from trl import SFTConfig, SFTTrainer

from fastdraft_hf.cli.run import quiet_libraries
from fastdraft_hf.data.columns import distribution_table
from fastdraft_hf.train.config import has_fast_bf16
from fastdraft_hf.train.distribution import TopK
from fastdraft_hf.train.head import fused_head_loss
from fastdraft_hf.train.objectives import Objective
from fastdraft_hf.train.trainer import DraftDistillationConfig, DraftDistillationTrainer

VOCABULARY, ROWS, LENGTH, TOP_K = 49_152, 8, 512, 32
CUDA = torch.cuda.is_available()


def make_draft() -> Any:
    wide = CUDA  # 50M on a GPU, 11M on a CPU
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=512 if wide else 192,
        intermediate_size=1536 if wide else 512,
        num_hidden_layers=8 if wide else 4,
        num_attention_heads=8 if wide else 3,
        num_key_value_heads=4 if wide else 3,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config)


def make_data(stored: bool, rows: int) -> datasets.Dataset:
    rng = np.random.default_rng(0)
    ids = rng.integers(0, VOCABULARY, (rows, LENGTH))
    data = datasets.Dataset.from_dict({"input_ids": ids, "labels": ids})
    if not stored:
        return data
    parts = []
    for _ in range(rows):
        top = np.stack([rng.choice(VOCABULARY, TOP_K, replace=False) for _ in range(LENGTH - 1)])
        mass = rng.dirichlet(np.full(TOP_K + 1, 0.3), LENGTH - 1).clip(1e-6)
        logs = np.log(mass / mass.sum(1, keepdims=True)).astype(np.float16)
        parts.append((LENGTH, top.astype(np.uint16), logs[:, :-1], logs[:, -1]))
    table = datasets.table.InMemoryTable(distribution_table(parts, 1.0))
    return datasets.concatenate_datasets([data, datasets.Dataset(table)], axis=1)


class Clock(TrainerCallback):
    """Seconds between the ends of steps; the first step warms up."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        if CUDA:
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())

    def seconds(self) -> list[float]:
        return [b - a for a, b in zip(self.ends, self.ends[1:], strict=False)]


def trainer_way(kind: str, steps: int, **settings: Any) -> Callable[[], list[float]]:
    """Return a run of a trainer; kind is trl or ours."""
    stored = settings.get("objective") not in (None, "ce")
    data = make_data(stored, ROWS * 2)
    arguments: dict[str, Any] = {
        "max_steps": steps + 1,
        "per_device_train_batch_size": ROWS,
        "learning_rate": 1e-3,
        "gradient_checkpointing": False,
        "bf16": CUDA,
        "use_cpu": not CUDA,
        "dataset_kwargs": {"skip_prepare_dataset": True},
        "max_length": LENGTH,
        "save_strategy": "no",
        "report_to": "none",
        "logging_steps": 1000,
        "disable_tqdm": True,
        "include_num_input_tokens_seen": "no",
        "dataloader_pin_memory": CUDA,
        **settings,
    }
    if kind == "ours":
        arguments = {"sampled_softmax": None, "use_muon": False, **arguments}
        arguments.setdefault("objective", "ce")
    tokenizer = _tokenizer()

    def run() -> list[float]:
        clock = Clock()
        with tempfile.TemporaryDirectory() as folder:
            common = {
                "model": make_draft(),
                "train_dataset": data,
                "processing_class": tokenizer,
                "callbacks": [clock],
            }
            if kind == "trl":
                trainer = SFTTrainer(args=SFTConfig(output_dir=folder, **arguments), **common)
            else:
                config = DraftDistillationConfig(output_dir=folder, **arguments)
                trainer = DraftDistillationTrainer(args=config, **common)
            trainer.train()
        return clock.seconds()

    return run


def plain_way(steps: int) -> Callable[[], list[float]]:
    """Return a plain loop with full logits: the model's own loss, clipping, AdamW."""
    data = make_data(False, ROWS * 2)
    device = "cuda" if CUDA else "cpu"

    def run() -> list[float]:
        model = make_draft().to(device).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
        clock = Clock()
        for step in range(steps + 1):
            rows = data[(step % 2) * ROWS : (step % 2 + 1) * ROWS]["input_ids"]
            ids = torch.tensor(rows, device=device)
            with torch.autocast(device, dtype=torch.bfloat16, enabled=CUDA):
                loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            clock.on_step_end()
        return clock.seconds()

    return run


def _tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models

    tokenizer = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<pad>"
    )


def speed(rounds: int, steps: int) -> None:
    ours = "DraftDistillationTrainer, ce"
    ways = {
        ours: trainer_way("ours", steps),
        "the same, head in float32": trainer_way("ours", steps, head_dtype="float32"),
        f"the same, kl from stored top-{TOP_K}": trainer_way("ours", steps, objective="kl"),
        "the same, 8,192 ids drawn": trainer_way("ours", steps, sampled_softmax=8192),
        "plain PyTorch, full logits": plain_way(steps),
        "TRL SFTTrainer": trainer_way("trl", steps),
    }
    if not CUDA and has_fast_bf16("cpu"):
        ways["the same, 8,192 ids drawn, bf16=True (a recipe's way)"] = trainer_way(
            "ours", steps, sampled_softmax=8192, bf16=True
        )
        ways["TRL SFTTrainer, bf16=True"] = trainer_way("trl", steps, bf16=True)
    medians: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds):
        for name, way in ways.items():
            medians[name].append(statistics.median(way()))
            rate = ROWS * LENGTH / medians[name][-1]
            print(f"round {number + 1}: {name}: {rate:,.0f} tokens/s", file=sys.stderr, flush=True)
    print(f"\n{make_draft().num_parameters():,} parameters, {ROWS} x {LENGTH} tokens a step\n")
    print("| way | tokens/s | time against ours, ce |")
    print("|---|---|---|")
    for name, taken in medians.items():
        ratios = [t / o for t, o in zip(taken, medians[ours], strict=True)]
        rate = ROWS * LENGTH / statistics.median(taken)
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        print(f"| {name} | {rate:,.0f} | {statistics.median(ratios):.2f}x ({spread}) |")
    if CUDA:
        # Forward and backward of a dense layer: 6 FLOPs per parameter and token.
        rate = ROWS * LENGTH / statistics.median(medians[ours])
        operations = 6 * make_draft().num_parameters() * rate
        peak = product_peak()
        print(
            f"\n{operations / 1e12:.1f} TFLOP/s of useful work (6 a parameter and token), "
            f"{operations / peak:.1%} of the {peak / 1e12:.0f} TFLOP/s of a large bfloat16 product"
        )


def product_peak(size: int = 8192) -> float:
    """Return the FLOP/s that this GPU reaches in one large product; data sheets promise more."""
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    for _ in range(3):
        a @ b
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(10):
        a @ b
    torch.cuda.synchronize()
    return 10 * 2 * size**3 / (time.perf_counter() - start)


def measure_memory(way: str, vocabulary: int) -> None:
    """Print the MB that one pass of a head's loss adds to this process's peak memory."""
    tokens, width = ROWS * LENGTH, 192
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(vocabulary, width, generator=generator).mul_(0.05).requires_grad_()
    hidden = torch.randn(tokens, width, generator=generator).requires_grad_()
    labels = torch.randint(vocabulary, (tokens,), generator=generator)
    target = None
    if way.startswith("kl"):
        ids = torch.randint(vocabulary // TOP_K, (tokens, TOP_K)) * TOP_K + torch.arange(TOP_K)
        logs = torch.log_softmax(torch.randn(tokens, TOP_K + 1), -1).half()
        target = TopK(ids, logs[:, :-1], logs[:, -1])
    dtype = torch.bfloat16 if "bfloat16" in way else torch.float32
    # Threads, kernels and their workspaces exist before the measurement.
    small = slice(64)
    few = None if target is None else target[small]

    def loss(rows: slice) -> torch.Tensor:
        part = few if rows == small else target
        if way == "full logits":
            logits = hidden[rows] @ weight.T
            return torch.nn.functional.cross_entropy(logits, labels[rows], reduction="sum")
        objective = Objective("ce" if target is None else "kl")
        return fused_head_loss(
            hidden[rows], weight, labels[rows], objective=objective, target=part, dtype=dtype
        ).loss

    loss(small).backward()
    weight.grad = hidden.grad = None
    # Not getrusage: its peak is inherited from the process that started this one.
    with open("/proc/self/clear_refs", "w") as refs:
        refs.write("5")  # reset the peak
    before = _status("VmRSS")
    loss(slice(None)).backward()
    print(json.dumps({"extra_mb": _status("VmHWM") - before}))


def _status(name: str) -> float:
    """Return a line of this process's memory in MB: VmRSS is its size, VmHWM its peak."""
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith(name))
    return int(line.split()[1]) / 1024


def memory() -> None:
    def extra(way: str, vocabulary: int) -> float:
        command = [sys.executable, __file__, "--memory-of", way, "--vocabulary", str(vocabulary)]
        found = subprocess.run(command, capture_output=True, text=True, check=True)
        return float(json.loads(found.stdout.splitlines()[-1])["extra_mb"])

    ways = ["full logits", "ce, float32", f"kl from stored top-{TOP_K}, float32"]
    if has_fast_bf16("cpu"):
        ways += ["ce, bfloat16", f"kl from stored top-{TOP_K}, bfloat16"]
    print("\n| loss over 4,096 tokens | peak it adds, vocabulary 49,152 | of full logits |")
    print("|---|---|---|")
    found = {way: extra(way, VOCABULARY) for way in ways}
    for way, value in found.items():
        print(f"| {way} | {value:,.0f} MB | {value / found['full logits']:.1%} |")
    gemma = 262_144
    print(
        f"\n| loss | growth from 49,152 to {gemma:,} ids | the head's weights and gradients grow |"
    )
    print("|---|---|---|")
    for way in ways[1:]:
        growth = extra(way, gemma) - found[way]
        # The gradient in float32, and the weights once more in the type of the products.
        own = (gemma - VOCABULARY) * 192 * (4 + (2 if "bfloat16" in way else 0)) / 2**20
        print(f"| {way} | {growth:,.0f} MB | {own:,.0f} MB |")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="times every way is run")
    parser.add_argument("--steps", type=int, default=3, help="timed steps of a run")
    parser.add_argument("--skip-memory", action="store_true", help="speed only")
    parser.add_argument("--skip-speed", action="store_true", help="memory only")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    parser.add_argument("--vocabulary", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory_of:
        measure_memory(args.memory_of, args.vocabulary)
        return
    quiet_libraries()
    where = torch.cuda.get_device_name() if CUDA else f"{torch.get_num_threads()} threads"
    print(f"{platform.processor() or platform.machine()}, {where}, torch {torch.__version__}")
    if not args.skip_speed:
        speed(args.rounds, args.steps)
    if not args.skip_memory:
        memory()


if __name__ == "__main__":
    main()
