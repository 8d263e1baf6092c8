"""The report's figures, as PNG files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastdraft_hf.evaluation.summary import TRAINING_STAGES, RunSummary

_STAGE_COLOURS = {"pretrain": "#4c72b0", "continue": "#dd8452", "align": "#55a868"}
_TASK_COLOURS = ["#4c72b0", "#dd8452", "#55a868", "#c44e52", "#8172b3"]


def _axes(title: str, x: str, y: str) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.8), dpi=130, layout="constrained")
    axes = figure.subplots()
    axes.set_title(title, fontsize=11)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def losses(summary: RunSummary, path: Path) -> None:
    """Draw training and held-out loss over the tokens seen, stage after stage."""
    figure, axes = _axes("Loss over tokens", "tokens seen", "cross-entropy, nats a token")
    offset = 0
    for stage in TRAINING_STAGES:
        log = summary.logs.get(stage)
        if not log:
            continue
        colour = _STAGE_COLOURS[stage]
        # A line of the log knows its step; only those with a loss know the tokens.
        tokens_at = {e["step"]: e["num_input_tokens_seen"] for e in log if "loss" in e}
        train = [(tokens_at[e["step"]], e["loss"]) for e in log if "loss" in e]
        held_out = [
            (_tokens_at(tokens_at, e["step"]), e["eval_loss"]) for e in log if "eval_loss" in e
        ]
        if train:
            x, y = zip(*train, strict=True)
            axes.plot([offset + t for t in x], y, color=colour, lw=1.2, alpha=0.7, label=stage)
        if held_out:
            x, y = zip(*held_out, strict=True)
            axes.plot(
                [offset + t for t in x], y, "o", color=colour, ms=4, label=f"{stage}, held out"
            )
        offset += max(tokens_at.values(), default=0)
    axes.legend(fontsize=8, frameon=False)
    figure.savefig(path)


def _tokens_at(known: dict[int, int], step: int) -> int:
    """Return the tokens seen at ``step``, by proportion of the nearest line that tells."""
    if not known:
        return 0
    nearest = min(known, key=lambda s: abs(s - step))
    return round(known[nearest] * step / max(nearest, 1))


def acceptance(summary: RunSummary, path: Path) -> None:
    """Draw the share of drafted blocks accepted up to each position, per task set."""
    evaluation = summary.evaluation
    assert evaluation is not None
    gamma = evaluation["num_assistant_tokens"]
    figure, axes = _axes(
        f"Acceptance by position, γ = {gamma}, T = {evaluation['temperature']:g}",
        "position in the drafted block",
        "share of blocks accepted up to here",
    )
    width = 0.8 / len(evaluation["tasks"])
    for number, (task, figures) in enumerate(evaluation["tasks"].items()):
        shares = figures["sampled"]["acceptance_by_position"]
        x = [
            p + 1 + (number - (len(evaluation["tasks"]) - 1) / 2) * width
            for p in range(len(shares))
        ]
        bars = axes.bar(x, shares, width * 0.92, color=_TASK_COLOURS[number % 5], label=task)
        axes.bar_label(bars, fmt="%.2f", fontsize=8)
    axes.set_xticks(range(1, gamma + 1))
    axes.set_ylim(0, None)
    axes.legend(fontsize=8, frameon=False)
    figure.savefig(path)


def speed(summary: RunSummary, path: Path) -> None:
    """Draw the wall-clock ratio over γ for each path and task set, with its interval."""
    bench = summary.bench
    assert bench is not None
    figure, axes = _axes(
        "Speed against γ, greedy, batch 1", "tokens drafted a round (γ)", "tokens/s, with / without"
    )
    styles = {"transformers": "--", "ours": ":", "openvino": "-", "ours-openvino": "-."}
    for name, found in bench["paths"].items():
        for number, (task, figures) in enumerate(found["tasks"].items()):
            gammas = [int(g) for g in figures["sweep"]]
            ratios = [v["ratio"] for v in figures["sweep"].values()]
            axes.errorbar(
                gammas,
                [r[0] for r in ratios],
                yerr=[
                    [max(0.0, r[0] - r[1]) for r in ratios],
                    [max(0.0, r[2] - r[0]) for r in ratios],
                ],
                fmt=styles.get(name, "-") + "o",
                ms=4,
                lw=1.2,
                capsize=2,
                color=_TASK_COLOURS[number % 5],
                alpha=1.0 if name == "openvino" else 0.6,
                label=f"{name}, {task}",
            )
    axes.axhline(1.0, color="black", lw=0.8)
    axes.set_ylim(0, None)
    axes.xaxis.get_major_locator().set_params(integer=True)
    figure.legend(fontsize=8, frameon=False, loc="outside lower center", ncols=2)
    figure.savefig(path)
