"""``fastdraft plan RECIPE.yaml [--hardware 8xH100]``: what a run costs and should bring."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastdraft_hf.plan.estimate import Plan
    from fastdraft_hf.plan.machines import Machine


def add_arguments(parser: argparse.ArgumentParser, name: str) -> None:
    parser.add_argument("recipe", type=Path, metavar="RECIPE.yaml", help="the recipe file")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="changes to the recipe, as for run"
    )
    parser.add_argument(
        "--hardware",
        default="cpu",
        metavar="HARDWARE",
        help="such as 8xH100, 8xGaudi2, 1xRTX4090 (default: the cores of this machine's CPU)",
    )
    parser.add_argument(
        "--acceptance",
        type=float,
        metavar="RATE",
        help="acceptance rate at γ = 3, such as stage evaluate measured in an earlier run "
        "(default: from the token budget)",
    )


def run(args: argparse.Namespace) -> None:
    from fastdraft_hf._errors import FastDraftError
    from fastdraft_hf.cli.run import quiet_libraries
    from fastdraft_hf.plan.estimate import make_plan
    from fastdraft_hf.plan.machines import parse_hardware
    from fastdraft_hf.recipe import read_recipe

    machine = parse_hardware(args.hardware)
    if args.acceptance is not None and not 0 < args.acceptance < 1:
        raise FastDraftError(f"--acceptance: got {args.acceptance:g}; give a rate between 0 and 1")
    # A recipe's `when: cuda` holds for every accelerator.
    device = "cpu" if machine.cpu else "cuda"
    recipe = read_recipe(args.recipe, [f"device={device}", *args.overrides])
    quiet_libraries()
    plan = make_plan(recipe, machine, args.acceptance)
    print(f"{args.recipe} on {args.hardware}, target {recipe.target}\n{render(plan)}")
    print(f"\nRun it with:\n  {command(plan.machine, [str(args.recipe), *args.overrides])}")


def command(machine: Machine, words: Sequence[str]) -> str:
    """Return the command that runs a recipe on a machine."""
    import shlex

    if machine.count == 1:
        return f"fastdraft run {shlex.join(words)}"
    nodes = machine.count // 8 if machine.count % 8 == 0 else 1
    file = ("multi_gpu" if nodes == 1 else "multi_node") if machine.cuda else "gaudi"
    more = f" --num_machines {nodes} --machine_rank RANK --main_process_ip HOST"
    return (
        f"accelerate launch --config_file recipes/accelerate/{file}.yaml --num_processes "
        f"{machine.count}{more if nodes > 1 else ''} recipes/run.py {shlex.join(words)}"
    )


def render(plan: Plan) -> str:
    """Return a plan as text."""
    rows = [("stage", "devices", "tokens", "time", "memory", "disk", "")]
    for stage in plan.stages:
        notes = list(stage.notes)
        if 0 < plan.machine.memory < stage.memory_bytes:
            notes.insert(0, "MORE MEMORY THAN A DEVICE HAS")
        sizes = size(stage.memory_bytes), size(stage.disk_bytes)
        cells = count(stage.tokens), duration(stage.seconds), *sizes, "; ".join(notes)
        rows.append((stage.stage, str(stage.devices), *cells))
    memory = size(max(stage.memory_bytes for stage in plan.stages))
    disk = size(sum(stage.disk_bytes for stage in plan.stages))
    rows.append(("total", "", "", duration(plan.seconds), memory, disk, ""))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    draft, target = plan.draft.parameters, plan.target.parameters
    lines = [
        f"a draft of {draft:,} parameters for {target:,} (1/{target / draft:.1f})",
        "",
        *("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows),
        "",
        f"Expected at an acceptance rate of {plan.acceptance:g} (γ = 3):",
    ]
    for gain in plan.gains:
        speeds = ", ".join(f"{path} {ratio:.2f}x" for path, ratio in gain["speed"].items())
        lines.append(
            f"  γ = {gain['num_assistant_tokens']}: block efficiency "
            f"{gain['block_efficiency']:.2f}, MBSU {gain['mbsu']:.2f}, speed {speeds or 'unknown'}"
        )
    return "\n".join([*lines, "", "Assumed:", *(f"- {line}" for line in plan.assumptions)])


def count(tokens: float) -> str:
    """Return a number of tokens, such as 5B."""
    return _in_units(tokens, {"B": 1e9, "M": 1e6, "k": 1e3, "": 1}) if tokens else ""


def size(amount: float) -> str:
    """Return bytes, such as 2.5 GB."""
    return _in_units(amount, {" TB": 1e12, " GB": 1e9, " MB": 1e6, " kB": 1e3})


def _in_units(amount: float, units: dict[str, float]) -> str:
    unit = next((u for u, factor in units.items() if amount >= factor), [*units][-1])
    return f"{amount / units[unit]:.3g}{unit}"


def duration(seconds: float) -> str:
    """Return a time in s, min or h."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
