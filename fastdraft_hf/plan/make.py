"""A plan from a recipe file's recipe, hardware's name and whatever of the target can be had."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastdraft_hf._errors import FastDraftError
from fastdraft_hf._extras import openvino_available
from fastdraft_hf.draft.design import design_draft
from fastdraft_hf.plan.acceptance import assumed_acceptance, chance_of
from fastdraft_hf.plan.amounts import (
    ASSUMPTIONS,
    LENGTH_SHARE,
    OTHER_LENGTH_SHARE,
    bench_answers,
    evaluation_answers,
)
from fastdraft_hf.plan.commands import commands, engine_of
from fastdraft_hf.plan.estimate import plan_stages
from fastdraft_hf.plan.hardware import (
    HOST_BANDWIDTH,
    HOST_FLOPS,
    Hardware,
    Utilisation,
)
from fastdraft_hf.plan.job import Job
from fastdraft_hf.plan.machines import Machine, Roofline
from fastdraft_hf.plan.measuring import gains
from fastdraft_hf.plan.result import Plan
from fastdraft_hf.plan.shapes import shape_of
from fastdraft_hf.plan.training import mean_rows
from fastdraft_hf.recipe import Recipe
from fastdraft_hf.target.embedded import EMBEDDED_ID
from fastdraft_hf.target.resolve import EMBEDDED_NAMES


def make_plan(
    recipe: Recipe,
    hardware: Hardware,
    *,
    name: str = "",
    target_config: Path | None = None,
    utilisation: float | None = None,
    acceptance: float | None = None,
    overrides: Sequence[str] = (),
) -> Plan:
    """Return the plan of a recipe.

    Args:
        recipe: as it is resolved for the hardware's device.
        hardware: accelerators, or this machine's CPU, which is then calibrated.
        name: of the recipe.
        target_config: a config.json, or a folder that holds one; else the target is looked up.
        utilisation: share of the peak FLOP/s that training reaches; by default `Utilisation`'s.
        acceptance: assumed acceptance rate at γ = 3.
        overrides: words that changed the recipe; they belong into the plan's commands.

    Raises:
        FastDraftError: the target's config cannot be had, or a number is out of range.
    """
    for option, value in (("--utilisation", utilisation), ("--acceptance", acceptance)):
        if value is not None and not 0 < value < 1:
            raise FastDraftError(f"{option}: between 0 and 1, got {value:g}")
    if utilisation is not None and hardware.device is None:
        raise FastDraftError("--utilisation: a CPU is measured, not assumed; leave it out")
    config, folder = find_config(recipe, target_config)
    target, draft_config = shape_of(config), draft_config_of(recipe, config)
    draft = shape_of(draft_config)
    assumed, note = assumed_acceptance(recipe)
    if acceptance is not None:
        assumed, note = acceptance, "as given"
    assumptions = [ASSUMPTIONS]
    ready = True
    machine: Machine
    if hardware.device is None:
        from fastdraft_hf.plan.calibrate import Subject, calibrate, openvino_ready

        settings = [a.setting for a in [*evaluation_answers(recipe), *bench_answers(recipe)]]
        measured = calibrate(
            Subject(recipe, folder, draft_config, target, draft, mean_rows(recipe), tuple(settings))
        )
        ready = openvino_ready(recipe, folder)
        assumptions += [f"measured here: {note}" for note in measured.notes]
        machine = measured
        if not openvino_available():
            assumptions.append("OpenVINO is not installed: its export and its paths cost nothing")
    else:
        shares = Utilisation() if utilisation is None else Utilisation(train=utilisation)
        machine = _roofline(recipe, hardware, shares)
        device = hardware.device
        assumptions += [
            f"{device.name}: {device.flops / 1e12:,.0f} TFLOP/s bfloat16, "
            f"{device.memory / 1e9:,.0f} GB at {device.bandwidth / 1e12:.2f} TB/s "
            f"({device.source})",
            f"shares of the peaks: training {shares.train:g}, reading {shares.prefill:g}, memory "
            f"bandwidth {shares.bandwidth:g}; {shares.layer_overhead * 1e3:g} ms a layer and step "
            "of eager decoding",
        ]
        if engine_of(recipe, hardware) == "vllm" and recipe.generate is not None:
            assumptions.append("generation: a vLLM server on each device, its speed by roofline")
        if not device.cuda:
            assumptions.append(
                f"this package decodes on CUDA devices and CPUs, so not on {device.name}: logits, "
                "export, evaluate and bench run on the host's CPU, taken for "
                f"{HOST_FLOPS / 1e12:g} TFLOP/s in float32 and {HOST_BANDWIDTH / 1e9:g} GB/s"
            )
        if hardware.count > 1:
            assumptions.append(
                "what uses several devices does so by the commands below (docs/scale-out.md), and "
                "time divides by their number: nothing is taken for what they tell each other"
            )
    job = Job(
        recipe,
        target,
        draft,
        hardware,
        machine,
        chance=chance_of(assumed, 3),
        export_ready=ready,
        folder=Path(recipe.output_dir),
    )
    return Plan(
        recipe=name,
        target=recipe.target,
        hardware=hardware.name,
        draft_parameters=draft.parameters,
        target_parameters=target.parameters,
        stages=tuple(plan_stages(job)),
        acceptance=assumed,
        acceptance_note=note,
        gains=tuple(gains(job)),
        assumptions=tuple(assumptions),
        commands=commands(recipe, hardware, name or "RECIPE.yaml", overrides),
    )


def _roofline(recipe: Recipe, hardware: Hardware, shares: Utilisation) -> Roofline:
    generate = recipe.generate
    if generate is None:
        return Roofline(hardware, shares)
    kinds = [wanted.kind for wanted in generate.sets.values()]
    known = [LENGTH_SHARE.get(kind, OTHER_LENGTH_SHARE) for kind in kinds] or [1.0]
    engine = engine_of(recipe, hardware)
    return Roofline(hardware, shares, generate.batch_size, engine, sum(known) / len(known))


def draft_config_of(recipe: Recipe, target_config: Any) -> Any:
    """Return the draft's config: designed, or read where the recipe names a draft."""
    given = recipe.design.draft
    return design_draft(target_config, recipe.design) if given is None else _read(Path(given))


def find_config(recipe: Recipe, given: Path | None = None) -> tuple[Any, Path | None]:
    """Return the target's config, and its folder if its weights are on this machine.

    Raises:
        FastDraftError: there is none.
    """
    if given is not None:
        return _read(given), None
    target = recipe.target
    if target in EMBEDDED_NAMES:
        folder = EMBEDDED_NAMES[target]()
        return _read(folder), folder
    folder = Path(target).expanduser()
    if folder.is_dir():
        return _read(folder), folder if any(folder.glob("*.safetensors")) else None
    return _from_hub(target, recipe.target_revision)


def _read(path: Path) -> Any:
    from transformers import AutoConfig

    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise FastDraftError(f"--target-config: {path} is no config.json and holds none")
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        kind = data["model_type"]
        return AutoConfig.for_model(**data)
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, KeyError) and "model_type" in str(error):
            kind = "none"
        elif isinstance(error, json.JSONDecodeError):
            raise FastDraftError(f"{file} is no valid JSON ({error})") from error
        reason = " ".join(str(error).split())[:160]
        raise FastDraftError(f"{file}: model_type {kind} cannot be read ({reason})") from error


def _from_hub(target: str, revision: str | None) -> tuple[Any, Path | None]:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    try:
        path = Path(hf_hub_download(target, "config.json", revision=revision))
    except HFValidationError as error:
        raise FastDraftError(f"target: '{target}' is neither a folder nor a model id") from error
    except GatedRepoError as error:
        raise FastDraftError(
            f"target: '{target}' is gated; accept its terms and run `hf auth login`, or give its "
            "config.json with --target-config"
        ) from error
    except RepositoryNotFoundError as error:
        raise FastDraftError(f"target: the Hub has no model '{target}'") from error
    except OSError as error:
        if target == EMBEDDED_ID and revision is None:
            folder = next(iter(EMBEDDED_NAMES.values()))()
            return _read(folder), folder
        raise FastDraftError(
            f"target: the config of '{target}' is not on this machine and the Hub is out of reach; "
            "give its config.json with --target-config"
        ) from error
    folder = path.parent
    return _read(folder), folder if any(folder.glob("*.safetensors")) else None
