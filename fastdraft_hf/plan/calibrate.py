"""A short calibration of this machine's CPU: the recipe's own steps, for some seconds each.

What is timed: products and memory reads; a few steps of the real trainer on a draft of the recipe's
shape; a few tokens of the target through the engine that writes; and a few rounds of decoding
along every path. What cannot be run here (a target of which only the config is at hand) is scaled
from the first two. A random draft is used: nothing it drafts is accepted, so a round is one token.
"""

from __future__ import annotations

import logging
import statistics
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastdraft_hf._extras import openvino_available
from fastdraft_hf._progress import Progress
from fastdraft_hf.data.engines import choose_engine
from fastdraft_hf.eval.bench import RUNTIMES, Setting
from fastdraft_hf.export.openvino import cache_folder
from fastdraft_hf.plan.machines import Measured
from fastdraft_hf.plan.shapes import Shape
from fastdraft_hf.recipe import Recipe
from fastdraft_hf.train.config import TrainConfig

logger = logging.getLogger(__name__)

# A timed training step has at most so many FLOPs; larger ones are timed with fewer tokens.
_STEP_FLOPS = 2e11
_STEPS = 8
# Decoding: prompt and answer of a timed answer, in tokens.
_PROMPT, _ANSWER = 150, 12
# Writing: prompt of a timed text (a middling context), tokens before and at the end of the timing.
_WRITE_PROMPT, _WRITE_TOKENS = 96, 33


@dataclass(frozen=True)
class Subject:
    """What is calibrated.

    Attributes:
        recipe: the recipe.
        target: the target's folder, if its weights are on this machine.
        draft_config: of the draft.
        target_shape, draft_shape: their parameters.
        row_tokens: mean length of a sequence, by training stage.
        settings: ways of decoding that are to be timed.
    """

    recipe: Recipe
    target: Path | None
    draft_config: Any
    target_shape: Shape
    draft_shape: Shape
    row_tokens: dict[str, float]
    settings: tuple[Setting, ...]


def calibrate(subject: Subject) -> Measured:
    """Run the calibration and return what it measured."""
    start = time.monotonic()
    parts = ["machine", *subject.recipe.training_stages()]
    if subject.target is not None:
        parts += ["writing", "decoding"]
    with Progress("calibrate", len(parts), "parts") as progress:
        flops, bandwidth = machine_peaks(subject.target_shape.width)
        progress.advance(1)
        notes = [f"float32 products {flops / 1e9:,.0f} GFLOP/s, memory {bandwidth / 1e9:,.1f} GB/s"]
        training: dict[str, float] = {}
        for name, config in subject.recipe.training_stages().items():
            rate = training_rate(subject, config, subject.row_tokens[name])
            training[name] = rate
            notes.append(f"{name}: {rate:,.0f} tokens/s in {_STEPS} steps of the trainer")
            progress.advance(1)
        writing: dict[str, Any] = {}
        decoding: dict[str, Any] = {}
        if subject.target is not None:
            writing, said = writing_rates(subject.recipe, subject.target, subject.target_shape)
            notes += said
            progress.advance(1)
            decoding, said = decoding_rates(subject)
            notes += said
            progress.advance(1)
        else:
            notes.append(
                "the target's weights are not here: its speed is scaled from the first two"
            )
    notes.append(f"the calibration took {time.monotonic() - start:.0f} s")
    return Measured(flops, bandwidth, training=training, notes=tuple(notes), **writing, **decoding)


def machine_peaks(width: int) -> tuple[float, float]:
    """Return float32 FLOP/s of products of ``width`` and bytes/s of reading memory."""
    import torch

    left, right = torch.randn(512, width), torch.randn(width, 2048)
    product = _median_seconds(lambda: left @ right)
    block = torch.ones(32_000_000)
    read = _median_seconds(block.sum)
    return 2.0 * 512 * width * 2048 / product, 4.0 * block.numel() / read


def _median_seconds(work: Any, repeats: int = 7) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def training_rate(subject: Subject, config: TrainConfig, row_tokens: float) -> float:
    """Return tokens/s of real steps of the trainer on random text, at the stage's shape."""
    import datasets
    import torch
    from transformers import AutoModelForCausalLM

    from fastdraft_hf.train.loop import training_arguments
    from fastdraft_hf.train.progress import StepTimer
    from fastdraft_hf.train.trainer import DraftDistillationTrainer

    length = max(8, min(round(row_tokens), config.max_length))
    rows = config.per_device_train_batch_size
    shape = subject.draft_shape
    while rows * length * shape.train_flops(length) > _STEP_FLOPS and (rows > 1 or length > 64):
        rows, length = (rows // 2, length) if rows > 1 else (1, length // 2)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, shape.vocabulary, (_STEPS * rows, length), generator=generator).tolist()
    state = torch.random.get_rng_state()
    with tempfile.TemporaryDirectory() as folder:
        arguments = training_arguments(
            _plain(config, rows), Path(folder), seed=0, device="cpu", max_steps=_STEPS
        )
        arguments.save_strategy = arguments.eval_strategy = arguments.logging_strategy = "no"
        arguments.disable_tqdm = True
        trainer = DraftDistillationTrainer(
            model=AutoModelForCausalLM.from_config(subject.draft_config, dtype=torch.float32),
            args=arguments,
            train_dataset=datasets.Dataset.from_list(
                [{"input_ids": row, "labels": row} for row in ids]
            ),
            processing_class=_blank_tokenizer(),
        )
        timer = StepTimer()
        trainer.add_callback(timer)
        trainer.train()
    torch.random.set_rng_state(state)
    seconds = statistics.median(timer.seconds[2:])
    timed = rows * length / seconds
    # A step that was cut down is scaled by what a token costs.
    return timed * shape.train_flops(length) / shape.train_flops(row_tokens)


def _plain(config: TrainConfig, rows: int) -> TrainConfig:
    """Return the section as it is timed: cross-entropy on ready rows, no accumulation."""
    changes = {
        "objective": "ce",
        "per_device_train_batch_size": rows,
        "gradient_accumulation_steps": 1,
        "trainer_args": {},
        "max_train_tokens": max(config.max_train_tokens, rows * config.max_length),
    }
    return config.model_copy(update=changes)


def _blank_tokenizer() -> Any:
    """Return a tokenizer for a trainer whose rows are ids already; only its padding is used."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"[PAD]": 0, "[EOS]": 1}, unk_token="[PAD]"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", eos_token="[EOS]")


def writing_rates(recipe: Recipe, target: Path, shape: Shape) -> tuple[dict[str, Any], list[str]]:
    """Time the engine that writes with a full batch; nothing where it is not ready to."""
    if recipe.generate is None:
        return {}, []
    batch = recipe.generate.batch_size
    found: dict[str, Any] = {"batch_size": batch}
    engine = str(choose_engine(recipe.generate.engine, "cpu"))
    if engine != "openvino":
        return found, [f"writing through {engine} is scaled from products and memory"]
    folder = cache_folder(target, recipe.generate.openvino_weight_format)
    if not folder.exists():
        return found, [
            "the target is not exported to OpenVINO yet: writing is scaled from products and memory"
        ]
    from fastdraft_hf.data.engines.openvino import OpenVINOEngine
    from fastdraft_hf.data.requests import requests_for

    # No stop ids: every text is as long as is asked for.
    writer = OpenVINOEngine(folder, set(), batch)
    prompts = [
        tuple((7 * row + 13 * place) % (shape.vocabulary - 8) + 8 for place in range(_WRITE_PROMPT))
        for row in range(batch)
    ]

    def seconds(tokens: int) -> float:
        requests = requests_for(
            prompts, temperatures=[1.0], max_new_tokens=tokens, seed=0, source="calibrate"
        )
        start = time.perf_counter()
        for _ in writer.generate(requests, lambda written: None):
            pass
        return time.perf_counter() - start

    seconds(1)  # allocates
    # In turn, and the quicker of each: one rate comes from a difference of the two.
    times = [(seconds(1), seconds(_WRITE_TOKENS)) for _ in range(2)]
    reading, whole = (min(column) for column in zip(*times, strict=True))
    found["write_rate"] = batch * (_WRITE_TOKENS - 1) / max(whole - reading, 1e-6)
    found["prompt_rate"] = batch * _WRITE_PROMPT / reading
    return found, [
        f"writing through OpenVINO: {found['write_rate']:,.0f} tokens/s, {batch} texts at once, "
        f"and {found['prompt_rate']:,.0f} prompt tokens/s"
    ]


def decoding_rates(subject: Subject) -> tuple[dict[str, Any], list[str]]:
    """Time a few rounds along every path of PyTorch, with a random draft.

    Of each path the smallest and the largest γ; `Measured` draws a line between them. OpenVINO's
    paths need an exported draft, which there is none of yet, and are scaled.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from fastdraft_hf.eval.engines import Models, load_engine
    from fastdraft_hf.eval.prompts import EvaluationPrompt

    assert subject.target is not None
    settings = ends_of(subject.settings)
    if not settings:
        return {}, []
    vocabulary = subject.target_shape.vocabulary
    ids = tuple((13 * place) % (vocabulary - 8) + 8 for place in range(_PROMPT))
    prompt = EvaluationPrompt("calibrate", "0", ids)
    rounds: dict[tuple[str, int], float] = {}
    firsts = []
    state = torch.random.get_rng_state()
    with tempfile.TemporaryDirectory() as folder:
        draft = AutoModelForCausalLM.from_config(subject.draft_config, dtype=torch.float32)
        draft.save_pretrained(folder)
        decode = load_engine(Models(str(subject.target), {"": folder}), settings)
        for setting in settings:
            # The same answer first: our loop times its kernels once for every number of rows, and
            # the last rounds of an answer draft fewer tokens.
            decode(setting, prompt, _ANSWER)
            record = decode(setting, prompt, _ANSWER)
            if record.target_passes < 2:
                continue
            first = record.first_token_seconds or 0.0
            rounds[setting.path, setting.num_assistant_tokens] = (record.seconds - first) / (
                record.target_passes - 1
            )
            firsts.append(first)
    torch.random.set_rng_state(state)
    found = {
        "rounds": rounds,
        "first_token": statistics.median(firsts) if firsts else None,
        "first_token_prompt": _PROMPT,
    }
    alone = rounds.get(("alone", 0))
    said = [] if alone is None else [f"decoding: the target alone {1 / alone:,.1f} tokens/s"]
    return found, said


def ends_of(settings: Iterable[Setting]) -> list[Setting]:
    """Return the smallest and the largest γ of each PyTorch path, baselines first."""
    known: dict[str, dict[int, Setting]] = {}
    for setting in settings:
        if setting.path in (*RUNTIMES["pytorch"], "alone") and not setting.draft:
            known.setdefault(setting.path, {})[setting.num_assistant_tokens] = setting
    found: list[Setting] = []
    for choices in known.values():
        drafted = sorted(g for g in choices if g > 0)
        wanted: Sequence[int] = [g for g in choices if g == 0] + drafted[:1] + drafted[-1:]
        found += [choices[g] for g in dict.fromkeys(wanted)]
    return sorted(found, key=lambda s: (s.path != "alone", s.path, s.num_assistant_tokens))


def openvino_ready(recipe: Recipe, target: Path | None) -> bool:
    """Return whether the target's OpenVINO folder is made already, or none is needed."""
    if recipe.generate is None or not openvino_available() or target is None:
        return True
    return cache_folder(target, recipe.generate.openvino_weight_format).exists()
