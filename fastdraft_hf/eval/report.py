"""A run's report: one self-contained HTML page, with its figures beside it as PNG."""

import base64
import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fastdraft_hf._card import python
from fastdraft_hf.eval.summary import (
    SPEED_NOTE,
    TRAINING_STAGES,
    RunSummary,
    acceptance_rows,
    acceptance_sentences,
    cut_sentence,
    speed_rows,
    stage_rows,
    verdict,
    with_interval,
)

# (accepted, text) of an answer, in order.
Pieces = Sequence[tuple[bool, str]]


def accepted_pieces(
    tokens: Sequence[int], rounds: Sequence[tuple[int, int]], decode: Callable[[list[int]], str]
) -> list[tuple[bool, str]]:
    """Return an answer as pieces (accepted, text): drafted and accepted, or the target's own.

    ``rounds`` are (drafted, accepted); a round emits its accepted tokens and one more.
    """
    # The text is cut where decoded prefixes of the answer end, never token by token: a character
    # may take several tokens, and a part of it decodes to a replacement character.
    marks = [mark for _, accepted in rounds for mark in [True] * accepted + [False]]
    marks = (marks + [False] * len(tokens))[: len(tokens)]
    pieces: list[tuple[bool, str]] = []
    written, drafted = "", False
    for end, by_draft in enumerate(marks, 1):
        text = decode(list(tokens[:end]))
        drafted = drafted or by_draft
        if text.endswith("\ufffd") and end < len(tokens):
            continue
        pieces.append((drafted, text[len(written) :]))
        written, drafted = text, False
    groups = itertools.groupby(pieces, key=lambda piece: piece[0])
    return [(accepted, "".join(part for _, part in group)) for accepted, group in groups]


def write_report(
    summary: RunSummary,
    folder: Path,
    *,
    samples: Sequence[tuple[str, Pieces]],
    target: str,
    draft_location: str,
    **texts: str,
) -> Path:
    """Write ``report.html`` and the figures into ``folder``; return the page's path.

    Nothing is loaded from outside the page, and nothing in it runs: texts of models, recipes and
    cards are escaped.

    Args:
        samples: (heading, pieces of an answer from `accepted_pieces`).
        target, draft_location: what the snippet loads.
        texts: ``title``, ``machine`` (in words), ``further`` (what a larger budget would take),
            ``recipe`` (YAML) and ``card`` (Markdown; empty for none).
    """
    from jinja2 import Environment

    evaluation, bench = summary.evaluation, summary.bench
    environment = Environment(autoescape=True)
    environment.filters["interval"] = with_interval
    source = Path(__file__).with_name("report_template.html").read_text(encoding="utf-8")
    page = environment.from_string(source).render(
        evaluation=evaluation,
        headline=filter(None, [verdict(bench), cut_sentence(bench)]),
        images=[
            (path.stem, base64.b64encode(path.read_bytes()).decode())
            for path in draw_figures(summary, folder)
        ],
        acceptance=acceptance_rows(evaluation) if evaluation else [],
        acceptance_sentences=acceptance_sentences(evaluation) if evaluation else [],
        speed=speed_rows(bench) if bench else [],
        speed_note=SPEED_NOTE,
        samples=samples,
        stages=stage_rows(summary.provenance),
        snippet=snippet(target, draft_location),
        versions=json.dumps(next(iter(summary.provenance.values()), {}).get("versions"), indent=1),
        **texts,
    )
    path = folder / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def snippet(target: str, draft_location: str) -> str:
    """Return the three lines that use the draft."""
    return (
        f"target = AutoModelForCausalLM.from_pretrained({python(target)})\n"
        f"draft = AutoModelForCausalLM.from_pretrained({python(draft_location)})\n"
        "target.generate(**inputs, assistant_model=draft)"
    )


_COLORS = ["#4c72b0", "#dd8452", "#55a868", "#c44e52", "#8172b3", "#937860", "#64b5cd", "#ccb974"]


def draw_figures(summary: RunSummary, folder: Path) -> list[Path]:
    """Write every figure that the run has data for, as PNG; return their paths."""
    figures = {
        "losses.png": summary.logs and _losses(summary.logs),
        "acceptance.png": summary.evaluation and _acceptance(summary.evaluation),
        "speed.png": (paths := (summary.bench or {}).get("paths")) and _speed(paths),
    }
    for name, figure in figures.items():
        if figure:
            figure.savefig(folder / name)
    return [folder / name for name, figure in figures.items() if figure]


def _figure(title: str) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.8), dpi=130, layout="constrained")
    axes = figure.subplots()
    axes.set_title(title, fontsize=11)
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _losses(logs: dict[str, list[dict[str, Any]]]) -> Any:
    """Draw training and held-out loss over the tokens seen, stage after stage."""
    import numpy as np

    figure, axes = _figure("Loss over tokens")
    axes.set(xlabel="tokens seen", ylabel="cross-entropy, nats per token")
    offset = 0
    for stage, color in zip(TRAINING_STAGES, _COLORS, strict=False):
        log = logs.get(stage, [])
        # A line of the log knows its step; only those with a training loss know the tokens.
        known = [(e["step"], e["num_input_tokens_seen"]) for e in log if "loss" in e]
        steps, tokens = zip((0, 0), *known, strict=True)
        for key, style, label in (("loss", "-", stage), ("eval_loss", "o", f"{stage}, held out")):
            if entries := [e for e in log if key in e]:
                x = offset + np.interp([e["step"] for e in entries], steps, tokens)
                y = [e[key] for e in entries]
                axes.plot(x, y, style, color=color, lw=1.2, ms=4, label=label)
        offset += tokens[-1]
    axes.legend(fontsize=8, frameon=False)
    return figure


def _acceptance(evaluation: dict[str, Any]) -> Any:
    """Draw the share of drafted blocks accepted up to each position, per task set."""
    gamma, tasks = evaluation["num_assistant_tokens"], evaluation["tasks"]
    title = f"Acceptance by position, γ = {gamma}, T = {evaluation['temperature']:g}"
    figure, axes = _figure(title)
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


def _speed(paths: dict[str, Any]) -> Any:
    """Draw speed-up over γ with intervals, one line per path."""
    import numpy as np

    figure, axes = _figure("Speed-up over the target alone, greedy, batch 1")
    for number, (name, found) in enumerate(paths.items()):
        gammas = found["overall"]["sweep"]
        ratios = np.array([v["ratio"] for v in gammas.values()]).T
        # Side by side, so that intervals at the same γ do not overlap.
        shift = (number - (len(paths) - 1) / 2) * min(0.06, 0.6 / len(paths))
        x = [int(gamma) + shift for gamma in gammas]
        # Resampled sums are added in another order: an interval may miss its value by rounding.
        widths = np.abs(ratios[1:] - ratios[0])
        style: dict[str, Any] = {"fmt": "-o", "ms": 3.5, "lw": 1.2, "capsize": 2}
        style |= {"color": _COLORS[number % len(_COLORS)], "label": name}
        axes.errorbar(x, ratios[0], widths, **style)
    axes.axhline(1.0, color="black", lw=0.8)
    axes.set_ylim(0, None)
    axes.set_xlabel("tokens drafted per round (γ)")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(fontsize=8, frameon=False, ncols=2)
    return figure
