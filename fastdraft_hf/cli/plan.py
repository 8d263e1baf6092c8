"""``fastdraft plan RECIPE.yaml --hardware 8xH100|cpu``: what it costs before it is run."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastdraft_hf.plan.result import Plan, StagePlan


def add_arguments(parser: argparse.ArgumentParser, name: str) -> None:
    parser.add_argument("recipe", type=Path, metavar="RECIPE.yaml", help="the recipe file")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="changes to the recipe, as for run"
    )
    parser.add_argument(
        "--hardware",
        default="cpu",
        metavar="HARDWARE",
        help="such as 8xH100, 8xGaudi2, 1xRTX4090; cpu runs a calibration of about half a minute "
        "on this machine (default: cpu)",
    )
    parser.add_argument(
        "--target-config",
        type=Path,
        metavar="FILE",
        help="the target's config.json, where the target itself is not at hand",
    )
    parser.add_argument(
        "--utilisation",
        type=float,
        metavar="SHARE",
        help="share of the peak FLOP/s that training reaches (default: 0.2)",
    )
    parser.add_argument(
        "--acceptance",
        type=float,
        metavar="RATE",
        help="acceptance rate at γ = 3 to reckon with (default: by the token budget)",
    )
    parser.add_argument("--json", action="store_true", help="print the plan as JSON")


def run(args: argparse.Namespace) -> None:
    import json

    from fastdraft_hf.plan.hardware import parse_hardware
    from fastdraft_hf.plan.make import make_plan
    from fastdraft_hf.recipe import read_recipe

    hardware = parse_hardware(args.hardware)
    # What the recipe changes on a GPU (`when: cuda`) holds for every accelerator.
    device = "cpu" if hardware.device is None else "cuda"
    recipe = read_recipe(args.recipe, [f"device={device}", *args.overrides])
    _quiet()
    plan = make_plan(
        recipe,
        hardware,
        name=str(args.recipe),
        target_config=args.target_config,
        utilisation=args.utilisation,
        acceptance=args.acceptance,
        overrides=args.overrides,
    )
    if args.json:
        print(json.dumps(plan.to_json(), indent=2, ensure_ascii=False))
    else:
        print(render(plan, None if hardware.device is None else hardware.device.memory))


def render(plan: Plan, device_memory: float | None) -> str:
    """Return a plan as text.

    Args:
        plan: the plan.
        device_memory: bytes of one device; stages that need more are marked.
    """
    lines = [
        f"{plan.recipe} on {plan.hardware}: a draft of {plan.draft_parameters:,} parameters for "
        f"{plan.target}, {plan.target_parameters:,} (1/"
        f"{plan.target_parameters / plan.draft_parameters:.1f})",
        "",
    ]
    rows: list[tuple[str, ...]] = [
        ("stage", "devices", "tokens", "FLOPs", "time", "memory", "disk", "")
    ]
    rows += [_row(stage, device_memory) for stage in plan.stages]
    total = plan.to_json()["total"]
    rows.append(
        (
            "total",
            "",
            "",
            _flops(total["flops"]),
            duration(plan.seconds),
            size(total["peak_memory_bytes"]),
            size(total["disk_bytes"]),
            "",
        )
    )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines += ["  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)).rstrip() for r in rows]
    lines += ["", f"Acceptance rate assumed: {plan.acceptance:g} at γ = 3, {plan.acceptance_note}."]
    for gain in plan.gains:
        speeds = ", ".join(f"{path} {ratio:.2f}x" for path, ratio in gain.speed.items())
        lines.append(
            f"  γ = {gain.num_assistant_tokens}: block efficiency {gain.block_efficiency:.2f}, "
            f"MBSU {gain.mbsu:.2f}" + (f"; predicted speed {speeds}" if speeds else "")
        )
    lines += ["", "Started with:"]
    lines += [f"- {', '.join(one.stages)}:\n    {one.line}" for one in plan.commands]
    lines += ["", "Memory is of one device, disk what stays. Assumed:"]
    lines += [f"- {assumption}" for assumption in plan.assumptions]
    return "\n".join(lines)


def _row(stage: StagePlan, device_memory: float | None) -> tuple[str, ...]:
    notes = list(stage.notes)
    if stage.finished:
        notes.insert(0, "finished; this is what it took")
    elif (
        device_memory is not None
        and stage.memory_bytes > device_memory
        and not any("the machine's" in note for note in notes)
    ):
        notes.insert(0, "MORE MEMORY THAN A DEVICE HAS")
    if stage.scratch_bytes > 1e9:
        notes.append(f"{size(stage.scratch_bytes)} of disk while it runs")
    return (
        stage.stage,
        str(stage.devices),
        count(stage.tokens),
        _flops(stage.flops),
        duration(stage.seconds),
        size(stage.memory_bytes),
        size(stage.disk_bytes),
        "; ".join(notes),
    )


def count(tokens: float) -> str:
    """Return a number of tokens as people say it."""
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if tokens >= unit:
            return f"{tokens / unit:.3g}{name}"
    return f"{tokens:.0f}" if tokens else ""


def _flops(flops: float) -> str:
    return f"{flops:.1e}" if flops else ""


def duration(seconds: float) -> str:
    """Return a time with the unit that fits it."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def size(amount: float) -> str:
    """Return bytes with the unit that fits them."""
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if amount >= unit:
            return f"{amount / unit:.3g} {name}"
    return f"{amount / 1e3:.0f} kB"


def _quiet() -> None:
    import warnings

    import datasets
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore", module="trl")
