"""Short trainings that one process and several must agree on; torchrun starts this file.

`test_distributed.py` runs every scenario once in its own process, with the full batch, and once in
two processes with half of it each.
"""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
from tiny_training import PLAIN, QUIET

from fastdraft_hf.data.packing import BlockStream, Encoder
from fastdraft_hf.data.sources import Source

VOCABULARY = 288
TOP_K = 6

# What differs from the defaults in `train`; `rows` is the batch of a step over all processes.
SCENARIOS: dict[str, dict[str, Any]] = {
    "ce_adamw": {},
    "ce_accumulated": {"gradient_accumulation_steps": 2},
    "kl_stored_muon": {"objective": {"ce": 0.3, "kl": 0.7}, "use_muon": True},
    "kl_stored_accumulated": {
        "objective": {"ce": 0.3, "kl": 0.7},
        "use_muon": True,
        "gradient_accumulation_steps": 2,
    },
    "kl_online": {"objective": "kl"},
    "token_budget": {"max_train_tokens": "230", "max_steps": -1},
    "streamed": {},
    "corpus": {"max_length": 8},
    "sampled": {"sampled_softmax": 20},
    "sampled_stored_accumulated": {
        "objective": "nla",
        "sampled_softmax": 20,
        "gradient_accumulation_steps": 2,
    },
    "grouped": {"train_sampling_strategy": "group_by_length"},
    # The last batch of a pass is not full, and cut rows keep their distributions.
    "ragged_stored": {"objective": {"ce": 0.3, "kl": 0.7}, "max_length": 9, "max_steps": 5},
    "ragged_resumed": {"max_steps": 5, "save_strategy": "steps", "save_steps": 2},
    "ragged_budget": {"max_train_tokens": "400", "max_steps": -1},
    "non_finite": {"max_steps": 3},
}
# FSDP2 shards the draft; the head is used outside of the forward pass that it is gathered for.
SHARDED = {
    "sharded_tied": {},
    "sharded_untied": {},
    "sharded_accumulated": {"gradient_accumulation_steps": 2},
    "sharded_stored": {"objective": {"ce": 0.3, "kl": 0.7}},
}
STEPS = 4
ROWS_A_STEP = 8


def free_port() -> int:
    """Return a port that torchrun's processes can meet at."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@dataclass(frozen=True)
class TwoProcesses:
    """Where they left what they found.

    Attributes:
        models: what the scenarios train, ``tied`` and ``untied``, ``target``, and a corpus.
        scenarios: ``NAME.RANK.json`` of every scenario, and its final weights.
    """

    models: Path
    scenarios: Path


def launch(folder: Path, tiny_model: Callable[..., Any], tokenizer: Any) -> TwoProcesses:
    """Prepare the models and start torchrun; a hang fails by its time limit."""
    models, scenarios = folder / "models", folder / "scenarios"
    scenarios.mkdir(parents=True)
    tiny_model(seed=1).save_pretrained(models / "tied")
    tiny_model(seed=2, tie_word_embeddings=False).save_pretrained(models / "untied")
    tiny_model(seed=3, hidden_size=48).save_pretrained(models / "target")
    for name in ("tied", "untied", "target"):
        tokenizer.save_pretrained(models / name)
    texts = ["".join(chr(97 + (n * 5 + i * (n + 3)) % 26) for i in range(40)) for n in range(60)]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (models / "text.jsonl").write_text(lines, encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    command += ["--master_port", str(free_port()), __file__, str(models), str(scenarios)]
    result = subprocess.run(
        command,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return TwoProcesses(models, scenarios)


def rows(count: int = 24, *, stored: bool = False) -> list[dict[str, Any]]:
    """Make rows of unequal length and unequal numbers of labels."""
    generator = torch.Generator().manual_seed(3)
    made = []
    for number in range(count):
        size = 5 + number * 7 % 11
        ids = torch.randint(3, 280, (size,), generator=generator).tolist()
        start = 1 + number % 4
        row = {"input_ids": ids, "labels": [-100] * start + ids[start:]}
        if stored:
            logits = torch.randn(size, VOCABULARY, generator=generator) * 3
            log_p, top = logits.log_softmax(-1).topk(TOP_K, -1)
            tail = (1 - log_p.exp().sum(-1)).log()
            empty: list[Any] = [[]] * start
            row["target_top_k_ids"] = empty + top[start:].tolist()
            row["target_top_k_logprobs"] = empty + log_p[start:].tolist()
            row["target_tail_logprob"] = [0.0] * start + tail[start:].tolist()
        made.append(row)
    return made


def train(name: str, models: Path, folder: Path, processes: int = 1) -> dict[str, Any]:
    """Run a scenario and return what is compared; final weights are in ``final``."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from fastdraft_hf.train.trainer import DraftDistillationConfig, DraftDistillationTrainer

    settings = dict({**SCENARIOS, **SHARDED}[name])
    accumulation = settings.get("gradient_accumulation_steps", 1)
    count = 19 if "ragged" in name else 24
    dataset: Any = datasets.Dataset.from_list(rows(count, stored="stored" in name))
    held_out = dataset.select(range(5))
    if name == "streamed":
        dataset = dataset.to_iterable_dataset()
    tokenizer = AutoTokenizer.from_pretrained(models / "tied")
    if name == "corpus":
        source = Source(kind="files", name=str(models / "text.jsonl"))
        dataset = BlockStream([source], Encoder(tokenizer), length=8, seed=0).as_dataset()
    args = DraftDistillationConfig(
        **{
            "output_dir": str(folder / name),
            "per_device_train_batch_size": ROWS_A_STEP // accumulation // processes,
            "per_device_eval_batch_size": 4 // processes,
            **PLAIN,
            **QUIET,
            "save_strategy": "no",
            "save_total_limit": None,
            "logging_steps": 1,
            "learning_rate": 5e-3,
            # AdamW divides by the gradient's size: of one near zero only rounding would be left.
            "adam_epsilon": 1e-4,
            "max_grad_norm": 1.0,
            "max_steps": STEPS,
            **settings,
        }
    )
    which = "untied" if "untied" in name else "tied"

    def make() -> DraftDistillationTrainer:
        return DraftDistillationTrainer(
            model=AutoModelForCausalLM.from_pretrained(models / which, dtype=torch.float32),
            args=args,
            train_dataset=dataset,
            eval_dataset=held_out,
            processing_class=tokenizer,
            teacher_model=str(models / "target") if name == "kl_online" else None,
        )

    trainer = make()
    found: dict[str, Any] = {"processes": args.world_size, "error": None}
    if name == "non_finite" and processes > 1:
        _poison(trainer, rank=1, step=2)
    try:
        trainer.train()
        if name == "ragged_resumed":
            trainer = make()
            trainer.train(str(folder / name / "checkpoint-2"))
    except Exception as error:
        found["error"] = f"{type(error).__name__}: {error}"
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    found |= {
        "losses": [entry["loss"] for entry in logs],
        "norms": [entry["grad_norm"] for entry in logs],
        "acceptance": [entry.get("expected_acceptance") for entry in logs],
        "tokens": trainer.state.num_input_tokens_seen,
        "step": trainer.state.global_step,
        "sharded": type(trainer.model).__name__.startswith("FSDP"),
    }
    if found["error"] is None:
        trainer.save_model(str(folder / name / "final"))
        if not found["sharded"]:
            evaluated = trainer.evaluate()
            found["evaluated"] = [evaluated["eval_loss"], evaluated["eval_mean_token_accuracy"]]
    return found


def _poison(trainer: Any, rank: int, step: int) -> None:
    """Make one process's hidden states NaN at one step."""
    calls = 0

    def spoil(module: Any, args: Any, output: Any) -> Any:
        nonlocal calls
        calls += 1
        if trainer.args.process_index == rank and calls == step:
            output.last_hidden_state = output.last_hidden_state * float("nan")
        return output

    trainer.model.get_decoder().register_forward_hook(spoil)


def shard_on_cpu() -> None:
    """Have accelerate use FSDP2, which it does for accelerators only, in CPU processes.

    It looks at the kind of processes and at nothing else before it prepares the model, so they are
    called GPUs here; everything after that is accelerate's and torch's own code.
    """
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    init = AcceleratorState.__init__

    def init_with_gpus(self: Any, *args: Any, **kwargs: Any) -> None:
        if PartialState._shared_state.get("distributed_type") == DistributedType.MULTI_CPU:
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        init(self, *args, **kwargs)

    AcceleratorState.__init__ = init_with_gpus
    os.environ |= {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_RESHARD_AFTER_FORWARD": "true",
        "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    }


def main(models: Path, folder: Path) -> None:
    rank, processes = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    for name in [*SCENARIOS, *SHARDED]:
        if name == next(iter(SHARDED)):
            shard_on_cpu()
        found = train(name, models, folder, processes)
        (folder / f"{name}.{rank}.json").write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
