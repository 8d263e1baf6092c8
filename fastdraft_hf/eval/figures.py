"""The report's figures, as PNG files."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fastdraft_hf.eval.bench import BASELINES
from fastdraft_hf.eval.summary import (
    TRAINING_STAGES,
    RunSummary,
    judged_ratio,
    path_words,
)

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


_ENGINES = {
    "alone": "transformers, target alone",
    "openvino-alone": "GenAI, target alone",
    "ours-openvino-alone": "OVModelForCausalLM, target alone",
}
# A path keeps its colour in every figure and run; other drafts take the rest.
_PATH_COLOURS = {
    "transformers": "#dd8452",
    "ours": "#4c72b0",
    "prompt-lookup": "#937860",
    "openvino": "#55a868",
    "openvino-prompt-lookup": "#8172b3",
    "ours-openvino": "#64b5cd",
}
_OTHER_COLOURS = ["#c44e52", "#da8bc3", "#8c8c8c", "#ccb974", "#2f4b7c", "#665191"]


def _colours(names: Iterable[str]) -> dict[str, str]:
    others = itertools.cycle(_OTHER_COLOURS)
    return {name: _PATH_COLOURS.get(name) or next(others) for name in names}


def speed(summary: RunSummary, path: Path) -> None:
    """Draw the wall-clock ratio over γ, a panel for each task set, with its intervals."""
    from matplotlib.figure import Figure

    bench = summary.bench
    assert bench is not None
    paths = bench["paths"]
    tasks = list(next(iter(paths.values()))["tasks"])
    rows = -(-len(tasks) // 2)
    legend = -(-len(paths) // 3)
    size = (6.4, 3.8 * rows + 0.2 * max(0, legend - 1))
    figure = Figure(figsize=size, dpi=130, layout="constrained")
    panels = figure.subplots(rows, min(len(tasks), 2), sharex=True, sharey=True, squeeze=False)
    colours = _colours(paths)
    for panel, task in itertools.zip_longest(panels.flat, tasks):
        if task is None:
            panel.set_visible(False)
            continue
        for place, (name, found) in enumerate(paths.items()):
            sweep = found["tasks"][task]["sweep"]
            ratios = [v["ratio"] for v in sweep.values()]
            # Beside one another, so that intervals at the same γ can be told apart.
            aside = (place - (len(paths) - 1) / 2) * min(0.06, 0.6 / len(paths))
            panel.errorbar(
                [int(g) + aside for g in sweep],
                [r[0] for r in ratios],
                yerr=[
                    [max(0.0, r[0] - r[1]) for r in ratios],
                    [max(0.0, r[2] - r[0]) for r in ratios],
                ],
                fmt="-o",
                ms=3.5,
                lw=1.2,
                elinewidth=0.9,
                capsize=2,
                color=colours[name],
                label=path_words(name),
            )
        panel.axhline(1.0, color="black", lw=0.8)
        panel.set_title(task, fontsize=10)
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
        panel.xaxis.get_major_locator().set_params(integer=True)
    panels.flat[0].set_ylim(0, None)  # shared; before the last panel it would cut off later ones
    figure.suptitle("Speed against γ, greedy, batch 1", fontsize=11)
    # Labels of the panels, not of the figure: those would lie on the legend.
    for panel in panels[-1]:
        panel.set_xlabel("tokens drafted a round (γ)")
    for panel in panels[:, 0]:
        panel.set_ylabel("tokens/s over the target alone")
    handles, labels = panels.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=8, frameon=False, loc="outside lower center", ncols=3)
    figure.savefig(path)


def wall_clock(summary: RunSummary, path: Path) -> None:
    """Draw tokens/s and time to first token of every path at its best γ, and of its baseline."""
    from matplotlib.figure import Figure

    bench = summary.bench
    assert bench is not None
    colours = _colours(bench["paths"])
    bars: list[tuple[str, str, float, float | None]] = []
    engine = ""
    # Paths of one engine below their common baseline.
    for name, found in sorted(
        bench["paths"].items(), key=lambda item: list(_ENGINES).index(BASELINES[item[1]["path"]])
    ):
        overall = found["overall"]
        if engine != BASELINES[found["path"]]:
            engine = BASELINES[found["path"]]
            alone, first = "alone_tokens_per_second", "alone_first_token_seconds"
            bars.append((_ENGINES[engine], "#b0b7c3", overall[alone], overall[first]))
        gamma = overall["best_num_assistant_tokens"]
        best = overall["sweep"][str(gamma)]
        words = f"{path_words(name)}, γ = {gamma}: {judged_ratio(overall)[0]:.2f}x"
        speeds = best["tokens_per_second"], best["first_token_seconds"]
        bars.append((words, colours[name], *speeds))
    figure = Figure(figsize=(6.4, 1.3 + 0.3 * len(bars)), dpi=130, layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    names = [bar[0] for bar in bars]
    fills = [bar[1] for bar in bars]
    firsts = [0.0 if bar[3] is None else 1e3 * bar[3] for bar in bars]
    for panel, title, values, form in (
        (panels[0], "tokens/s", [bar[2] for bar in bars], "%.1f"),
        (panels[1], "time to first token, ms", firsts, "%.0f"),
    ):
        drawn = panel.barh(range(len(bars)), values, color=fills, height=0.72)
        panel.bar_label(drawn, fmt=form, fontsize=8, padding=2)
        panel.set_title(title, fontsize=10)
        panel.set_xlim(0, 1.3 * max(*values, 1e-9))  # room for the figures at the bars' ends
        panel.grid(axis="x", alpha=0.3)
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(labelsize=8)
    panels[0].set_yticks(range(len(bars)), names)
    panels[0].invert_yaxis()
    figure.savefig(path)
