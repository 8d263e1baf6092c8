"""The search's figures, as PNG files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

_COLOURS = ["#4c72b0", "#dd8452", "#55a868", "#c44e52", "#8172b3", "#937860", "#64b5cd"]
_MOST_LINES = 10


def draw(results: dict[str, Any], folder: Path) -> list[Path]:
    """Write ``speed-over-depth.png``, ``speed-over-gamma.png`` and ``latency.png``."""
    folder.mkdir(parents=True, exist_ok=True)
    figures = {
        "speed-over-depth.png": speed_over_depth,
        "speed-over-gamma.png": speed_over_gamma,
        "latency.png": latency,
    }
    for name, make in figures.items():
        make(results, folder / name)
    return [folder / name for name in figures]


def _figure(columns: int = 1) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure

    width = 6.4 if columns == 1 else 4.4 * columns
    figure = Figure(figsize=(width, 3.8), dpi=130, layout="constrained")
    panels = figure.subplots(1, columns, squeeze=False)[0]
    for panel in panels:
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    return figure, list(panels)


def _speeds(row: dict[str, Any], scenario: int) -> dict[int, float]:
    speeds = row["predictions"][scenario]["tokens_per_second"]
    return {int(gamma): speed for gamma, speed in speeds.items()}


def speed_over_depth(results: dict[str, Any], path: Path) -> None:
    """Draw the best predicted speed at each depth, a line for each acceptance."""
    figure, (axes,) = _figure()
    rows = results["designs"]
    depths = sorted({row["layers"] for row in rows})
    for number, best in enumerate(results["best_by_acceptance"]):
        tops = [
            max(max(_speeds(row, number).values()) for row in rows if row["layers"] == depth)
            for depth in depths
        ]
        colour = _COLOURS[number % len(_COLOURS)]
        given = len({row["predictions"][number]["acceptance"] for row in rows}) == 1
        label = f"acceptance {best['acceptance']:.2f}" if given else "acceptance by design"
        axes.plot(depths, tops, "-o", ms=4, color=colour, label=label)
    axes.set_title("Predicted speed over depth, best width and γ", fontsize=11)
    axes.set_xlabel("layers of the draft, at one parameter budget")
    axes.set_ylabel("tokens/s, predicted")
    axes.set_xticks(depths)
    # Not from zero: the U is a matter of some per cent where drafts are cheap beside the target.
    axes.margins(y=0.25)
    axes.legend(fontsize=8, frameon=False)
    figure.savefig(path)


def speed_over_gamma(results: dict[str, Any], path: Path) -> None:
    """Draw the predicted speed of every design over γ, at the first acceptance."""
    figure, (axes,) = _figure()
    rows = sorted(results["designs"], key=lambda row: -max(_speeds(row, 0).values()))
    for number, row in enumerate(rows[:_MOST_LINES]):
        speeds = _speeds(row, 0)
        colour = _COLOURS[number % len(_COLOURS)]
        style = "-o" if number < len(_COLOURS) else "--o"
        axes.plot([*speeds], [*speeds.values()], style, ms=3, lw=1.2, color=colour)
        axes.lines[-1].set_label(f"{row['design']}, α {row['predictions'][0]['acceptance']:.2f}")
    axes.set_title("Predicted speed over γ", fontsize=11)
    axes.set_xlabel("tokens drafted a round (γ)")
    axes.set_ylabel("tokens/s, predicted")
    axes.set_xticks([*_speeds(rows[0], 0)])
    axes.set_ylim(0, 1.08 * max(_speeds(rows[0], 0).values()))
    axes.legend(fontsize=7, frameon=False, ncols=2)
    figure.savefig(path)


def latency(results: dict[str, Any], path: Path) -> None:
    """Draw the time of a draft's pass against layers and against width, with quartiles."""
    figure, panels = _figure(2)
    rows, law = results["designs"], results["law"]
    middle = {key: sum(row[key] for row in rows) / len(rows) for key in ("layers", "width")}
    for panel, key, other in ((panels[0], "layers", "width"), (panels[1], "width", "layers")):
        times = [[1e3 * t for t in row["next_pass_seconds"]] for row in rows]
        x = [row[key] for row in rows]
        low_high = [[t[0] - t[1] for t in times], [t[2] - t[0] for t in times]]
        panel.errorbar(
            x, [t[0] for t in times], yerr=low_high, fmt="o", ms=4, capsize=2, color=_COLOURS[0]
        )
        for row, time in zip(rows, times, strict=True):
            panel.annotate(
                str(row[other]), (row[key], time[0]), (4, 4), textcoords="offset points", fontsize=7
            )
        if law["separable"]:
            slope = {"layers": law["layer"], "width": law["width"]}
            ends = [min(x), max(x)]
            at_mean = law["base"] + slope[other] * middle[other]
            fit = [1e3 * (at_mean + slope[key] * end) for end in ends]
            panel.plot(ends, fit, color="black", lw=0.8, label="fit at the mean of the other")
            panel.legend(fontsize=7, frameon=False)
        panel.set_xlabel(f"{key} (the small figures: {other})")
        panel.set_ylim(0, None)
    panels[0].set_ylabel("a draft's pass over one token, ms")
    figure.suptitle("Latency of drafts of one parameter budget", fontsize=11)
    figure.savefig(path)
