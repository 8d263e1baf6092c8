"""``fastdraft plan RECIPE.yaml|--target ID``: what a run costs and should bring."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastdraft_hf.plan.estimate import Plan
    from fastdraft_hf.plan.machines import Machine


def add_arguments(parser: argparse.ArgumentParser, name: str) -> None:
    from fastdraft_hf.cli.run import add_recipe_arguments

    add_recipe_arguments(parser)
    add = parser.add_argument
    add(
        "--hardware",
        default="cpu",
        metavar="HARDWARE",
        help="such as 8xH100, 8xGaudi2, 1xRTX4090 (default: the cores of this machine's CPU)",
    )
    add(
        "--acceptance",
        type=float,
        metavar="RATE",
        help="acceptance rate at γ = 3, such as stage evaluate measured in an earlier run "
        "(default: from the token budget)",
    )


def run(args: argparse.Namespace) -> None:
    from fastdraft_hf._errors import FastDraftError
    from fastdraft_hf.cli.run import quiet_libraries, recipe_of
    from fastdraft_hf.plan.estimate import Plan
    from fastdraft_hf.plan.machines import parse_hardware

    machine = parse_hardware(args.hardware)
    if args.acceptance is not None and not 0 < args.acceptance < 1:
        raise FastDraftError(f"--acceptance: got {args.acceptance:g}; give a rate between 0 and 1")
    # A recipe's `when: cuda` holds for every accelerator.
    device = "cpu" if machine.cpu else "cuda"
    recipe = recipe_of(args, f"device={device}")
    quiet_libraries()
    plan = Plan(recipe, machine, args.acceptance)
    print(f"target {recipe.target} on {args.hardware}\n{render(plan)}")
    options = {key: getattr(args, key) for key in ("target", "params", "hours")}
    words = [word for k, v in options.items() if v is not None for word in (f"--{k}", str(v))]
    words += [*filter(None, [args.recipe]), *args.overrides]
    print(f"\nRun it with:\n  {command(plan.machine, words)}")


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
    from tqdm import tqdm

    from fastdraft_hf.plan.estimate import StagePlan

    rows = [("stage", "devices", "tokens", "time", "memory", "disk", "")]
    total = StagePlan(
        "total",
        seconds=sum(stage.seconds for stage in plan.stages),
        memory_bytes=max(stage.memory_bytes for stage in plan.stages),
        disk_bytes=sum(stage.disk_bytes for stage in plan.stages),
        devices=0,
    )
    for stage in [*plan.stages, total]:
        notes = list(stage.notes)
        if 0 < plan.machine.memory < stage.memory_bytes:
            notes.insert(0, "MORE MEMORY THAN A DEVICE HAS")
        tokens = tqdm.format_sizeof(stage.tokens).replace("G", "B") if stage.tokens else ""
        sizes = (tqdm.format_sizeof(n, "B") for n in (stage.memory_bytes, stage.disk_bytes))
        cells = str(stage.devices or ""), tokens, tqdm.format_interval(stage.seconds), *sizes
        rows.append((stage.stage, *cells, "; ".join(notes)))
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
