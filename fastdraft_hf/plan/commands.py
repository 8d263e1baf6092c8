"""Which commands start what a plan reckons with, stage by stage.

`fastdraft run` does everything on one device. On several, training is `recipes/train.py`, started
by accelerate, and generation is started by torchrun or reads from a server a device; what measures
the draft stays in one process. A plan counts a device only where one of these commands uses it.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastdraft_hf.data.task_sets import KNOWN, settings_of
from fastdraft_hf.plan.hardware import Hardware
from fastdraft_hf.recipe import Recipe, distribution_source
from fastdraft_hf.train.config import TrainConfig

# Devices of a machine; a larger number is so many machines, if it divides.
_OF_A_MACHINE = 8


@dataclass(frozen=True)
class Command:
    """A command line and the stages that it does."""

    stages: tuple[str, ...]
    line: str


def engine_of(recipe: Recipe, hardware: Hardware) -> str:
    """Return the engine that writes on accelerators: ``transformers``, or ``vllm`` for servers.

    The package itself runs on CPUs and CUDA (ROCm) devices; others write through servers.
    """
    generate = recipe.generate
    if generate is None:
        return "transformers"
    if generate.servers or generate.engine == "vllm" or not hardware.cuda:
        return "vllm"
    return "transformers" if generate.engine == "auto" else generate.engine


def not_launched(recipe: Recipe) -> str | None:
    """Return why `recipes/train.py` cannot do this recipe's training, ``None`` if it can."""
    for name, stage in recipe.training_stages().items():
        kinds = {source.kind for source in stage.sources}
        wanted = {"generated"} if name == "align" else {"hub"}
        if kinds != wanted or (name != "align" and len(stage.sources) > 2):
            return f"{name}.sources are not what recipes/train.py reads"
        if any(source.data_dir for source in stage.sources):
            return f"{name}.sources: data_dir is not read by recipes/train.py"
        if distribution_source(recipe, name) != "none":
            return f"{name}: the target's distribution"
        if stage.max_minutes is not None:
            return f"{name}.max_minutes"
        if stage.trainer_args or stage.lora or stage.tokens_dir:
            return f"{name}: trainer_args, lora or tokens_dir"
    names = {name for name, own in _tasks(recipe) if own is None}
    if any(own is not None for _, own in _tasks(recipe)) or not names <= set(KNOWN):
        return "task sets of your own are held out by fastdraft run only"
    return None


def training_devices(recipe: Recipe, hardware: Hardware) -> int:
    """Return on how many devices training runs."""
    return hardware.count if not_launched(recipe) is None else 1


def commands(
    recipe: Recipe, hardware: Hardware, name: str, overrides: Sequence[str] = ()
) -> tuple[Command, ...]:
    """Return the commands of a plan, in the order they are given in.

    Args:
        recipe: as it is resolved for the hardware.
        hardware: what it runs on.
        name: of the recipe's file.
        overrides: words that changed it.
    """
    words = " ".join([name, *map(shlex.quote, overrides)])
    from fastdraft_hf.stages.runner import planned

    stages = planned(recipe)
    several = hardware.count > 1 or not hardware.cuda
    if hardware.device is None or not several:
        return (Command(tuple(stages), f"fastdraft run {words}"),)
    found: list[Command] = []
    out = recipe.output_dir
    writes = Command(("generate",), _generate(recipe, hardware, words))
    if not_launched(recipe) is not None:
        if recipe.generate is not None:
            found.append(writes)
        rest = tuple(stage for stage in stages if stage != "generate")
        found.append(Command(rest, f"CUDA_VISIBLE_DEVICES=0 fastdraft run {words}"))
        return tuple(found)
    found.append(Command(("design",), f"fastdraft design --config {words}"))
    draft = f"{out}/design"
    for stage, config in recipe.training_stages().items():
        if stage == "align" and recipe.generate is not None:
            found.append(writes)
        folder = f"{out}-{stage}"
        line = " ".join(
            [_launcher(hardware), "recipes/train.py", *_words(recipe, stage, config, draft, folder)]
        )
        found.append(Command((stage,), line))
        draft = f"{folder}/model"
    if recipe.align is None and recipe.generate is not None:
        found.append(writes)
    started = {stage for command in found for stage in command.stages}
    rest = tuple(stage for stage in stages if stage not in started)
    without = " ".join(f"{stage}=null" for stage in stages if stage in started - {"design"})
    measured = f"output_dir={out}-measured design.draft={draft} {without}".strip()
    found.append(Command(rest, f"fastdraft run {words} {measured}"))
    return tuple(found)


def _machines(hardware: Hardware) -> tuple[int, int]:
    """Return machines, and devices on each."""
    count = hardware.count
    if count > _OF_A_MACHINE and count % _OF_A_MACHINE == 0:
        return count // _OF_A_MACHINE, _OF_A_MACHINE
    return 1, count


def _generate(recipe: Recipe, hardware: Hardware, words: str) -> str:
    machines, each = _machines(hardware)
    if engine_of(recipe, hardware) == "vllm":
        line = f"fastdraft generate --config {words}"
        servers = recipe.generate.servers if recipe.generate is not None else []
        if servers:
            return line
        ports = ", ".join(f"http://HOST:{8000 + i}/v1" for i in range(min(2, hardware.count)))
        more = ", ..." if hardware.count > 2 else ""
        return f'{line} "generate.server=[{ports}{more}]"'
    start = f"torchrun --nproc_per_node {each}"
    if machines > 1:
        start += f" --nnodes {machines} --node_rank RANK --master_addr HOST"
    return f"{start} -m fastdraft_hf.cli.main generate --config {words}"


def _launcher(hardware: Hardware) -> str:
    machines, each = _machines(hardware)
    if not hardware.cuda:
        file, many = "gaudi", each != _OF_A_MACHINE or machines > 1
    else:
        file, many = ("multi_node" if machines > 1 else "multi_gpu"), each != _OF_A_MACHINE
    line = f"accelerate launch --config_file recipes/accelerate/{file}.yaml"
    if machines > 1:
        line += f" --num_machines {machines} --num_processes {hardware.count}"
        return f"{line} --machine_rank RANK --main_process_ip HOST"
    return f"{line} --num_processes {each}" if many else line


def _words(recipe: Recipe, stage: str, config: TrainConfig, draft: str, folder: str) -> list[str]:
    """Return what `recipes/train.py` is told besides `recipes/train/<stage>.yaml`."""
    told: dict[str, Any] = {
        "config": f"recipes/train/{stage}.yaml",
        "model_name_or_path": draft,
        "output_dir": folder,
        **_data(recipe, stage, config),
        "max_train_tokens": config.max_train_tokens,
        "max_length": config.max_length,
        "per_device_train_batch_size": config.per_device_train_batch_size,
    }
    # The file has the defaults of a recipe's section; what differs is said.
    usual = TrainConfig()
    for ours, theirs in (
        ("gradient_accumulation_steps", "gradient_accumulation_steps"),
        ("learning_rate", "learning_rate"),
        ("matrix_optimizer", "matrix_optimizer"),
        ("matrix_learning_rate", "matrix_learning_rate"),
        ("warmup", "warmup_steps"),
        ("decay", "decay_share"),
        ("weight_decay", "weight_decay"),
        ("max_grad_norm", "max_grad_norm"),
    ):
        if getattr(config, ours) != getattr(usual, ours):
            told[theirs] = getattr(config, ours)
    told["lr_scheduler_type"] = config.lr_scheduler_type
    told["seed"] = recipe.seed
    return [
        f"--{key} {shlex.join(map(str, value if isinstance(value, list) else [value]))}"
        for key, value in told.items()
    ]


def _data(recipe: Recipe, stage: str, config: TrainConfig) -> dict[str, Any]:
    if stage == "align":
        names = dict.fromkeys(source.name for source in config.sources)
        sets = recipe.generate.sets if recipe.generate is not None else {}
        told: dict[str, Any] = {"dataset": f"{recipe.output_dir}/generate"}
        if set(names) != set(sets):  # all of them is what the script reads by itself
            told["generated_sets"] = list(names)
        return told
    first, *second = config.sources
    told = {"dataset": first.name, "dataset_text_field": first.column}
    if first.subset is not None:
        told["dataset_config"] = first.subset
    for other in second:
        told |= {"mix_dataset": other.name, "mix_text_field": other.column}
        if other.subset is not None:
            told["mix_dataset_config"] = other.subset
        told["mix_share"] = f"{other.weight / (first.weight + other.weight):.4g}"
    return told


def _tasks(recipe: Recipe) -> list[tuple[str, Any]]:
    return [*settings_of(recipe.evaluate.tasks), *settings_of(recipe.bench.tasks)]
