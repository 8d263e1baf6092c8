"""The report's figures, as PNG files."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

from fastdraft_hf.eval.bench import BASELINES
from fastdraft_hf.eval.summary import TRAINING_STAGES, RunSummary, path_words

_COLORS = ["#4c72b0", "#dd8452", "#55a868", "#c44e52", "#8172b3", "#937860", "#64b5cd", "#ccb974"]
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
    for name, draw, data in (
        ("losses.png", losses, summary.logs),
        ("acceptance.png", acceptance, summary.evaluation),
        ("speed.png", speed, summary.bench and summary.bench["paths"]),
    ):
        if data:
            draw(data).savefig(folder / name)
            made.append(folder / name)
    return made


def _figure(height: float, *titles: str) -> tuple[Any, Any]:
    """Return a figure and its panels, one above the other."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, height), dpi=130, layout="constrained")
    panels = figure.subplots(len(titles), 1, squeeze=False)[:, 0]
    for panel, title in zip(panels, titles, strict=True):
        panel.set_title(title, fontsize=11)
        panel.grid(alpha=0.3)
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
    return figure, panels


def losses(logs: dict[str, list[dict[str, Any]]]) -> Any:
    """Draw training and held-out loss over the tokens seen, stage after stage."""
    figure, (axes,) = _figure(3.8, "Loss over tokens")
    axes.set(xlabel="tokens seen", ylabel="cross-entropy, nats per token")
    offset = 0
    for stage, color in zip(TRAINING_STAGES, _COLORS, strict=False):
        log = logs.get(stage, [])
        # A line of the log knows its step; only those with a training loss know the tokens.
        tokens = {e["step"]: e["num_input_tokens_seen"] for e in log if "loss" in e}
        for key, style, label in (("loss", "-", stage), ("eval_loss", "o", f"{stage}, held out")):
            points = [(offset + _tokens_at(tokens, e["step"]), e[key]) for e in log if key in e]
            if points:
                x, y = zip(*points, strict=True)
                axes.plot(x, y, style, color=color, lw=1.2, ms=4, label=label)
        offset += max(tokens.values(), default=0)
    axes.legend(fontsize=8, frameon=False)
    return figure


def _tokens_at(known: dict[int, int], step: int) -> int:
    """Return the tokens seen at ``step``, in proportion to the nearest known step."""
    nearest = min(known, key=lambda s: abs(s - step), default=step)
    return round(known.get(nearest, 0) * step / max(nearest, 1))


def acceptance(evaluation: dict[str, Any]) -> Any:
    """Draw the share of drafted blocks accepted up to each position, per task set."""
    gamma, tasks = evaluation["num_assistant_tokens"], evaluation["tasks"]
    title = f"Acceptance by position, γ = {gamma}, T = {evaluation['temperature']:g}"
    figure, (axes,) = _figure(3.8, title)
    axes.set(xlabel="position in the drafted block", ylabel="share of blocks accepted up to here")
    width = 0.8 / len(tasks)
    for number, (task, found) in enumerate(tasks.items()):
        shares = found["sampled"]["acceptance_by_position"]
        shift = 1 + (number - (len(tasks) - 1) / 2) * width
        x = [position + shift for position in range(len(shares))]
        bars = axes.bar(x, shares, width * 0.92, color=_COLORS[number % len(_COLORS)], label=task)
        axes.bar_label(bars, fmt="%.2f", fontsize=8)
    axes.set_xticks(range(1, gamma + 1))
    axes.set_ylim(0, None)
    axes.legend(fontsize=8, frameon=False)
    return figure


def speed(paths: dict[str, Any]) -> Any:
    """Draw speed-up over γ with intervals, and tokens/s of each path's best γ and its baseline."""
    colors = dict(zip(paths, itertools.cycle(_COLORS), strict=False))
    titles = "Speed-up over the target alone, greedy, batch 1", "tokens/s at the best γ"
    figure, (sweep, bars) = _figure(5 + 0.5 * len(paths), *titles)
    for number, (name, found) in enumerate(paths.items()):
        gammas = found["overall"]["sweep"]
        ratios = [v["ratio"] for v in gammas.values()]
        # Side by side, so that intervals at the same γ can be told apart.
        shift = (number - (len(paths) - 1) / 2) * min(0.06, 0.6 / len(paths))
        sweep.errorbar(
            [int(gamma) + shift for gamma in gammas],
            [value for value, _, _ in ratios],
            # Resampled sums are added in another order: an interval may miss its value by rounding.
            yerr=list(
                zip(*((max(0, v - lo), max(0, hi - v)) for v, lo, hi in ratios), strict=True)
            ),
            fmt="-o",
            ms=3.5,
            lw=1.2,
            capsize=2,
            color=colors[name],
            label=path_words(name),
        )
    sweep.axhline(1.0, color="black", lw=0.8)
    sweep.set_ylim(0, None)
    sweep.set_xlabel("tokens drafted per round (γ)")
    sweep.xaxis.get_major_locator().set_params(integer=True)
    sweep.legend(fontsize=8, frameon=False, ncols=2)
    rows: dict[str, tuple[float, str]] = {}
    for name, found in sorted(paths.items(), key=lambda item: BASELINES[item[1]["path"]]):
        overall = found["overall"]
        alone = _ALONE[BASELINES[found["path"]]]
        rows.setdefault(alone, (overall["alone_tokens_per_second"], "#b0b7c3"))
        gamma = overall["best_num_assistant_tokens"]
        label = f"{path_words(name)}, γ = {gamma}: {overall['judged']['ratio'][0]:.2f}x"
        rows[label] = overall["sweep"][str(gamma)]["tokens_per_second"], colors[name]
    values, fills = zip(*rows.values(), strict=True)
    drawn = bars.barh(list(rows), values, color=fills, height=0.72)
    bars.bar_label(drawn, fmt="%.1f", fontsize=8, padding=2)
    bars.tick_params(labelsize=8)
    bars.margins(x=0.15)  # room for the numbers at the bars' ends
    bars.invert_yaxis()
    return figure
