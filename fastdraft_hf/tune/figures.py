"""The search's figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

_MOST_LINES = 10


def draw(results: dict[str, Any], path: Path) -> None:
    """Write a PNG: predicted speed over depth and over γ, and a drafted token's time by depth."""
    from matplotlib.figure import Figure

    rows = results["designs"]
    figure = Figure(figsize=(14, 4), dpi=120, layout="constrained")
    depth, gamma, latency = figure.subplots(1, 3)
    tops = {row["design"]: max(row["tokens_per_second"].values()) for row in rows}
    depths = sorted({row["layers"] for row in rows})
    best = [max(tops[row["design"]] for row in rows if row["layers"] == n) for n in depths]
    depth.plot(depths, best, "-o", ms=4)
    depth.set(xlabel="layers, at one parameter budget", ylabel="tokens/s, predicted")
    for row in sorted(rows, key=lambda row: -tops[row["design"]])[:_MOST_LINES]:
        speeds = {int(g): speed for g, speed in row["tokens_per_second"].items()}
        label = f"{row['design']}, α {row['acceptance']:.2f}"
        gamma.plot([*speeds], [*speeds.values()], "-o", ms=3, lw=1.2, label=label)
    gamma.set(xlabel="drafted tokens per round (γ)", ylabel="tokens/s, predicted")
    gamma.legend(fontsize=7, frameon=False)
    times = [1e3 * row["drafted_token_seconds"] for row in rows]
    latency.plot([row["layers"] for row in rows], times, "o", ms=4)
    for row, time in zip(rows, times, strict=True):
        offset = {"xytext": (4, 4), "textcoords": "offset points", "fontsize": 7}
        latency.annotate(str(row["width"]), (row["layers"], time), **offset)
    latency.set(xlabel="layers (at each point: width)", ylabel="a drafted token, ms")
    for axes in (depth, gamma, latency):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
