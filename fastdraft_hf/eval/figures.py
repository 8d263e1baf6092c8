"""The report's figures, as PNG files."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fastdraft_hf.eval.bench import BASELINES
from fastdraft_hf.eval.summary import TRAINING_STAGES, RunSummary, judged_ratio, path_words

_STAGE_COLORS = {"pretrain": "#4c72b0", "continue": "#dd8452", "align": "#55a868"}
_TASK_COLORS = ["#4c72b0", "#dd8452", "#55a868", "#c44e52", "#8172b3"]
# A path has one color in every figure and run; other drafts take the remaining ones.
_PATH_COLORS = {
    "transformers": "#dd8452",
    "ours": "#4c72b0",
    "prompt-lookup": "#937860",
    "openvino": "#55a868",
    "openvino-prompt-lookup": "#8172b3",
    "ours-openvino": "#64b5cd",
}
_OTHER_COLORS = ["#c44e52", "#da8bc3", "#8c8c8c", "#ccb974", "#2f4b7c", "#665191"]
# The target alone, by the path of the baseline.
_ALONE = {
    "alone": "transformers, target alone",
    "ours": "our loop, target alone",
    "openvino-alone": "GenAI, target alone",
    "ours-openvino": "our loop on OpenVINO, target alone",
}


def draw_figures(summary: RunSummary, folder: Path) -> list[Path]:
    """Write every figure that the run has data for; return their paths."""
    made = []
    timed = bool(summary.bench and summary.bench["paths"])
    for name, draw, present in (
        ("losses.png", losses, bool(summary.logs)),
        ("acceptance.png", acceptance, summary.evaluation is not None),
        ("speed.png", speed, timed),
        ("wall_clock.png", wall_clock, timed),
    ):
        if present:
            draw(summary, folder / name)
            made.append(folder / name)
    return made


def _panels(width: float, height: float, rows: int, columns: int, **share: Any) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=130, layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, **share)
    for panel in panels.flat:
        panel.grid(alpha=0.3)
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
    return figure, panels


def losses(summary: RunSummary, path: Path) -> None:
    """Draw training and held-out loss over the tokens seen, stage after stage."""
    figure, ((axes,),) = _panels(6.4, 3.8, 1, 1)
    axes.set_title("Loss over tokens", fontsize=11)
    axes.set_xlabel("tokens seen")
    axes.set_ylabel("cross-entropy, nats per token")
    offset = 0
    for stage in TRAINING_STAGES:
        log = summary.logs.get(stage)
        if not log:
            continue
        # A line of the log knows its step; only those with a loss know the tokens.
        tokens = {e["step"]: e["num_input_tokens_seen"] for e in log if "loss" in e}
        curves = (
            (stage, "-", [(tokens[e["step"]], e["loss"]) for e in log if "loss" in e]),
            (
                f"{stage}, held out",
                "o",
                [(_tokens_at(tokens, e["step"]), e["eval_loss"]) for e in log if "eval_loss" in e],
            ),
        )
        for label, style, points in curves:
            if points:
                x, y = zip(*points, strict=True)
                shifted = [offset + t for t in x]
                axes.plot(shifted, y, style, color=_STAGE_COLORS[stage], lw=1.2, ms=4, label=label)
        offset += max(tokens.values(), default=0)
    axes.legend(fontsize=8, frameon=False)
    figure.savefig(path)


def _tokens_at(known: dict[int, int], step: int) -> int:
    """Return the tokens seen at ``step``, in proportion to the nearest known step."""
    if not known:
        return 0
    nearest = min(known, key=lambda s: abs(s - step))
    return round(known[nearest] * step / max(nearest, 1))


def acceptance(summary: RunSummary, path: Path) -> None:
    """Draw the share of drafted blocks accepted up to each position, per task set."""
    evaluation = summary.evaluation
    assert evaluation is not None
    gamma, tasks = evaluation["num_assistant_tokens"], evaluation["tasks"]
    figure, ((axes,),) = _panels(6.4, 3.8, 1, 1)
    axes.set_title(
        f"Acceptance by position, γ = {gamma}, T = {evaluation['temperature']:g}", fontsize=11
    )
    axes.set_xlabel("position in the drafted block")
    axes.set_ylabel("share of blocks accepted up to here")
    width = 0.8 / len(tasks)
    for number, (task, figures) in enumerate(tasks.items()):
        shares = figures["sampled"]["acceptance_by_position"]
        shift = (number - (len(tasks) - 1) / 2) * width
        x = [position + 1 + shift for position in range(len(shares))]
        bars = axes.bar(x, shares, width * 0.92, color=_TASK_COLORS[number % 5], label=task)
        axes.bar_label(bars, fmt="%.2f", fontsize=8)
    axes.set_xticks(range(1, gamma + 1))
    axes.set_ylim(0, None)
    axes.legend(fontsize=8, frameon=False)
    figure.savefig(path)


def _colors(names: Iterable[str]) -> dict[str, str]:
    others = itertools.cycle(_OTHER_COLORS)
    return {name: _PATH_COLORS.get(name) or next(others) for name in names}


def speed(summary: RunSummary, path: Path) -> None:
    """Draw the speed-up over γ with its intervals, a panel for each task set."""
    assert summary.bench is not None
    paths = summary.bench["paths"]
    tasks = list(next(iter(paths.values()))["tasks"])
    rows, legend = -(-len(tasks) // 2), -(-len(paths) // 3)
    height = 3.8 * rows + 0.2 * max(0, legend - 1)
    figure, panels = _panels(6.4, height, rows, min(len(tasks), 2), sharex=True, sharey=True)
    colors = _colors(paths)
    for panel, task in itertools.zip_longest(panels.flat, tasks):
        if task is None:
            panel.set_visible(False)
            continue
        for number, (name, found) in enumerate(paths.items()):
            sweep = found["tasks"][task]["sweep"]
            ratios = [v["ratio"] for v in sweep.values()]
            # Side by side, so that intervals at the same γ can be told apart.
            shift = (number - (len(paths) - 1) / 2) * min(0.06, 0.6 / len(paths))
            panel.errorbar(
                [int(g) + shift for g in sweep],
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
                color=colors[name],
                label=path_words(name),
            )
        panel.axhline(1.0, color="black", lw=0.8)
        panel.set_title(task, fontsize=10)
        panel.xaxis.get_major_locator().set_params(integer=True)
    panels.flat[0].set_ylim(
        0, None
    )  # shared: set before the last panel it would cut off later ones
    figure.suptitle("Speed-up over γ, greedy, batch 1", fontsize=11)
    # Labels of the panels: those of the figure would overlap the legend.
    for panel in panels[-1]:
        panel.set_xlabel("tokens drafted per round (γ)")
    for panel in panels[:, 0]:
        panel.set_ylabel("tokens/s over the target alone")
    handles, labels = panels.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=8, frameon=False, loc="outside lower center", ncols=3)
    figure.savefig(path)


def wall_clock(summary: RunSummary, path: Path) -> None:
    """Draw tokens/s and time to first token of every path at its best γ, and of its baseline."""
    assert summary.bench is not None
    colors = _colors(summary.bench["paths"])
    # (label, color, tokens/s, seconds to the first token)
    bars: list[tuple[str, str, float, float | None]] = []
    by_baseline = itertools.groupby(
        sorted(
            summary.bench["paths"].items(),
            key=lambda item: list(_ALONE).index(BASELINES[item[1]["path"]]),
        ),
        key=lambda item: BASELINES[item[1]["path"]],
    )
    for baseline, group in by_baseline:
        for number, (name, found) in enumerate(group):
            overall = found["overall"]
            if not number:
                alone = overall["alone_tokens_per_second"], overall["alone_first_token_seconds"]
                bars.append((_ALONE[baseline], "#b0b7c3", *alone))
            gamma = overall["best_num_assistant_tokens"]
            best = overall["sweep"][str(gamma)]
            label = f"{path_words(name)}, γ = {gamma}: {judged_ratio(overall)[0]:.2f}x"
            speeds = best["tokens_per_second"], best["first_token_seconds"]
            bars.append((label, colors[name], *speeds))
    figure, (panels,) = _panels(6.4, 1.3 + 0.3 * len(bars), 1, 2, sharey=True)
    firsts = [0.0 if bar[3] is None else 1e3 * bar[3] for bar in bars]
    for panel, title, values, form in (
        (panels[0], "tokens/s", [bar[2] for bar in bars], "%.1f"),
        (panels[1], "time to first token, ms", firsts, "%.0f"),
    ):
        fills = [bar[1] for bar in bars]
        drawn = panel.barh(range(len(bars)), values, color=fills, height=0.72)
        panel.bar_label(drawn, fmt=form, fontsize=8, padding=2)
        panel.set_title(title, fontsize=10)
        panel.set_xlim(0, 1.3 * max(*values, 1e-9))  # room for the numbers at the bars' ends
        panel.tick_params(labelsize=8)
    panels[0].set_yticks(range(len(bars)), [bar[0] for bar in bars])
    panels[0].invert_yaxis()
    figure.savefig(path)
