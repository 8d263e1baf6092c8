"""Measure this machine's CPU on the recipe's own steps, for at most a minute.

A random draft of the recipe's shape is trained for a few steps and decodes a few tokens, of which
none is accepted, so a round is one token.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastdraft_hf._progress import Progress
from fastdraft_hf.eval.bench import RUNTIMES, Setting
from fastdraft_hf.plan.estimate import bench_answers, evaluate_answers, passes, row_tokens
from fastdraft_hf.plan.machines import Machine, Shape, cpu_machine
from fastdraft_hf.recipe import Recipe

# No target above this size is loaded, and no part starts another measurement after PART_SECONDS.
LARGEST_TARGET, PART_SECONDS = 1e9, 12.0
# Steps and longest sequence of training; prompt and answer of decoding.
STEPS, LONGEST_ROW, PROMPT, ANSWER = 5, 512, 150, 8


def calibrate(
    recipe: Recipe, folder: Path, draft_config: Any, target: Shape, draft: Shape
) -> Machine:
    """Return this machine with its measured rates.

    Args:
        recipe: the recipe.
        folder: the target's; without weights, its speed is estimated.
        draft_config: the draft's.
        target, draft: their shapes.
    """
    stages, rates = recipe.training_stages(), dict[str, float]()
    sets = {
        name: passes(name, wanted)[-1][1:]
        for name, wanted in (recipe.generate.sets if recipe.generate else {}).items()
    }
    with Progress("measuring this CPU", 2 + len(stages), "parts") as progress:
        machine = cpu_machine(*machine_peaks(target.width), rates)
        progress.advance(1)
        for name in stages:
            length = min(LONGEST_ROW, round(row_tokens(recipe, name, sets)))
            rates[name] = training_rate(recipe, name, length, draft_config, draft, machine)
            progress.advance(1)
        if target.parameters < LARGEST_TARGET and any(folder.glob("*.safetensors")):
            rates |= decoding_rates(recipe, folder, draft_config, target)
        progress.advance(1)
    return machine


def machine_peaks(width: int) -> tuple[float, float]:
    """Return float32 FLOP/s of products of ``width`` and bytes/s of reading memory."""
    import torch

    def seconds(work: Callable[[], Any]) -> float:
        times = []
        for _ in range(7):
            start = time.perf_counter()
            work()
            times.append(time.perf_counter() - start)
        return statistics.median(times[1:])

    left, right, block = torch.randn(512, width), torch.randn(width, 2048), torch.ones(32_000_000)
    product = seconds(lambda: left @ right)
    return 2.0 * 512 * width * 2048 / product, 4.0 * block.numel() / seconds(block.sum)


def training_rate(
    recipe: Recipe, name: str, length: int, draft_config: Any, draft: Shape, machine: Machine
) -> float:
    """Return the tokens/s of a few steps of the trainer on random rows, cross-entropy only."""
    import datasets
    import torch
    from tokenizers import Tokenizer, models
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    from fastdraft_hf.train.callbacks import StepTimer
    from fastdraft_hf.train.trainer import DraftDistillationTrainer

    config = recipe.training_stages()[name]
    fits = PART_SECONDS * machine.train_rate("", draft, length) / STEPS
    rows = max(1, min(config.per_device_train_batch_size, int(fits / length)))
    backend = Tokenizer(models.WordLevel({"[PAD]": 0, "[EOS]": 1}, unk_token="[PAD]"))
    with tempfile.TemporaryDirectory() as work, torch.random.fork_rng():
        update = {"objective": "ce", "per_device_train_batch_size": rows}
        section = config.model_copy(update={**update, "gradient_accumulation_steps": 1})
        changes: dict[str, Any] = {"max_steps": STEPS, "max_train_tokens": None}
        changes |= {"max_minutes": None} | dict.fromkeys(
            ("save_strategy", "eval_strategy", "logging_strategy"), "no"
        )
        args = section.trainer_config(work, seed=0, device="cpu", disable_tqdm=True, **changes)
        ids = torch.randint(0, draft.vocabulary, (STEPS * rows, length)).tolist()
        trainer = DraftDistillationTrainer(
            model=AutoModelForCausalLM.from_config(draft_config, dtype=torch.float32),
            args=args,
            train_dataset=datasets.Dataset.from_dict({"input_ids": ids, "labels": ids}),
            processing_class=PreTrainedTokenizerFast(
                tokenizer_object=backend, pad_token="[PAD]", eos_token="[EOS]"
            ),
        )
        timer = StepTimer()
        trainer.add_callback(timer)
        trainer.train()
    return float(rows * length / statistics.median(timer.seconds[2:]))


def decoding_rates(
    recipe: Recipe, folder: Path, draft_config: Any, target: Shape
) -> dict[str, float]:
    """Return the seconds of a round on each PyTorch path of the recipe, and the reading rate."""
    import torch
    from transformers import AutoModelForCausalLM

    from fastdraft_hf.eval.engines import Models, load_engine
    from fastdraft_hf.eval.prompts import EvaluationPrompt

    answers = [*evaluate_answers(recipe), *bench_answers(recipe)]
    wanted = {(g, path) for path, g, _, _ in answers if path in (*RUNTIMES["pytorch"], "alone")}
    last = max(gamma for gamma, _ in wanted)
    # Baselines and the largest γ first, in case time runs out.
    order = sorted(wanted, key=lambda one: (one[0] not in (0, last), *one))
    settings = [Setting(path, "", gamma) for gamma, path in order]
    ids = tuple(13 * n % (target.vocabulary - 8) + 8 for n in range(PROMPT))
    prompt = EvaluationPrompt("calibrate", "0", ids)
    rates, firsts, start = dict[str, float](), [], time.monotonic()
    with tempfile.TemporaryDirectory() as work, torch.random.fork_rng():
        AutoModelForCausalLM.from_config(draft_config, dtype=torch.float32).save_pretrained(work)
        decode = load_engine(Models(str(folder), {"": work}), settings)
        for one in settings:
            decode(one, prompt, ANSWER)  # kernels are chosen once for every number of rows
            record = decode(one, prompt, ANSWER)
            first, rounds = record.first_token_seconds or 0.0, record.target_passes - 1
            if rounds > 0:
                rates[f"{one.path}/{one.num_assistant_tokens}"] = (record.seconds - first) / rounds
                firsts.append(first)
            if time.monotonic() > start + PART_SECONDS:
                break
    return {**rates, "read": PROMPT / statistics.median(firsts)} if any(firsts) else rates
