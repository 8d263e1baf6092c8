"""A run's report: one self-contained HTML page with its figures beside it as PNG."""

from __future__ import annotations

import base64
import html
import itertools
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fastdraft_hf.eval import figures
from fastdraft_hf.eval.summary import (
    SPEED_NOTE,
    RunSummary,
    acceptance_rows,
    comparison_rows,
    estimators_sentence,
    held_out_sentence,
    memory_rows,
    speed_rows,
    stage_rows,
    verdict,
    with_interval,
)

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem;
       color: #1c2430; background: #fff; }
h1 { font-size: 1.7rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
table { border-collapse: collapse; font-size: .87rem; margin: .8rem 0; }
th, td { text-align: left; padding: .3rem .8rem .3rem 0; border-bottom: 1px solid #d9dee6; }
.figures { display: flex; flex-wrap: wrap; gap: 1rem; }
.figures img { width: 29rem; max-width: 100%; }
pre { background: #f4f6f9; padding: .8rem 1rem; overflow-x: auto; font-size: .85rem; }
.sample { white-space: pre-wrap; font: .85rem/1.5 ui-monospace, monospace; background: #f4f6f9;
          padding: .8rem 1rem; margin: .5rem 0 1.2rem; }
.card { border: 1px solid #d9dee6; padding: 0 1.5rem; margin: .8rem 0; }
.accepted { background: #bfe8cb; } .verdict { font-size: 1.05rem; }
.key { font-size: .85rem; color: #5a6675; }
"""


def draw_figures(summary: RunSummary, folder: Path) -> list[Path]:
    """Write every figure the run has data for; return their paths."""
    made = []
    for name, draw, present in (
        ("losses.png", figures.losses, bool(summary.logs)),
        ("acceptance.png", figures.acceptance, summary.evaluation is not None),
        ("speed.png", figures.speed, bool(summary.bench and summary.bench["paths"])),
        ("wall_clock.png", figures.wall_clock, bool(summary.bench and summary.bench.get("best"))),
    ):
        if present:
            draw(summary, folder / name)
            made.append(folder / name)
    return made


def accepted_pieces(
    tokens: Sequence[int], rounds: Sequence[tuple[int, int]], decode: Callable[[list[int]], str]
) -> list[tuple[bool, str]]:
    """Return an answer as pieces (accepted, text): drafted and accepted, or the target's own.

    Args:
        tokens: the answer's ids.
        rounds: (drafted, accepted) per round; a round emits its accepted tokens and one more.
        decode: ids to text.
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


def marked_sample(pieces: Sequence[tuple[bool, str]]) -> str:
    """Return `accepted_pieces` as HTML, the accepted ones marked."""
    return "".join(
        f'<span class="accepted">{html.escape(text)}</span>' if accepted else html.escape(text)
        for accepted, text in pieces
    )


def write_report(
    summary: RunSummary,
    folder: Path,
    *,
    title: str,
    machine: str,
    target: str,
    draft_location: str,
    samples: Sequence[tuple[str, str]],
    resolved_recipe: str,
    further: str,
    card: str = "",
) -> Path:
    """Write ``report.html`` and the figures into ``folder``.

    Args:
        summary: the run's records.
        folder: where to.
        title: the page's heading.
        machine: what it was measured on.
        target: what the snippet loads as the target.
        draft_location: what it loads as the draft.
        samples: (heading, answer as HTML from `marked_sample`).
        resolved_recipe: YAML.
        further: what a larger budget would take, in words.
        card: the model card's Markdown, shown as a page; empty for none.
    """
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        f"<p class=key>Measured on {html.escape(machine)}.</p>",
    ]
    parts += _headline(summary)
    images = [_image(path) for path in draw_figures(summary, folder)]
    parts.append(f'<div class="figures">{"".join(images)}</div>')
    if summary.evaluation is not None:
        parts.append("<h2>Acceptance on held-out prompts</h2>")
        parts.append(_table(acceptance_rows(summary.evaluation)))
        for sentence in (
            estimators_sentence(summary.evaluation),
            held_out_sentence(summary.evaluation),
        ):
            if sentence:
                parts.append(f"<p>{html.escape(sentence)}</p>")
        parts.append(_greedy_sentence(summary.evaluation))
    if summary.bench is not None:
        parts.append("<h2>Wall clock, greedy, batch 1</h2>")
        parts += _wall_clock(summary.bench)
    if samples:
        parts.append(
            "<h2>Samples</h2><p class=key>Marked: tokens the draft proposed and the target "
            "accepted. The text is the target's own either way.</p>"
        )
        for heading, body in samples:
            parts.append(
                f'<div class=key>{html.escape(heading)}</div><div class="sample">{body}</div>'
            )
    parts.append("<h2>What it cost</h2>")
    parts.append(_table(stage_rows(summary.provenance)))
    parts.append(f"<p>{html.escape(further)}</p>")
    parts.append("<h2>Use it</h2>")
    parts.append(f"<pre>{html.escape(snippet(target, draft_location))}</pre>")
    parts.append(f"<h2>Recipe</h2><pre>{html.escape(resolved_recipe)}</pre>")
    if card:
        parts.append(f"<h2>Model card</h2>{card_preview(card)}")
    versions = next(iter(summary.provenance.values()), {}).get("versions", {})
    parts.append(f"<h2>Versions</h2><pre>{html.escape(json.dumps(versions, indent=1))}</pre>")
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head><body>"
        + "\n".join(parts)
        + "</body></html>\n"
    )
    path = folder / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def card_preview(card: str) -> str:
    """Return a card's Markdown as HTML, much as the Hub shows it: no metadata, no comments."""
    from markdown_it import MarkdownIt

    text = re.sub(r"\A---\n.*?\n---\n", "", card, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    # Raw HTML of a card that somebody wrote on is shown as text, and runs nothing.
    page = MarkdownIt("commonmark", {"html": False}).enable("table").disable("image").render(text)
    return (
        f'<details><summary>as the Hub shows it</summary><div class="card">{page}</div></details>'
    )


def snippet(target: str, draft_location: str) -> str:
    """Return the three lines that use the draft."""
    return (
        f'target = AutoModelForCausalLM.from_pretrained("{target}")\n'
        f'draft = AutoModelForCausalLM.from_pretrained("{draft_location}")\n'
        "target.generate(**inputs, assistant_model=draft)"
    )


def _headline(summary: RunSummary) -> list[str]:
    parts = []
    if summary.evaluation is not None:
        sampled = summary.evaluation["overall"]["sampled"]
        parts.append(
            f"<p class=verdict>A draft of {summary.evaluation['draft_parameters']:,} parameters "
            f"(1/{1 / summary.evaluation['cost_ratio']:.1f} of the target). Acceptance rate "
            f"{with_interval(sampled['acceptance_rate'], 3)}, block efficiency "
            f"{with_interval(sampled['block_efficiency'])}, memory-bound speed-up "
            f"{with_interval(sampled['mbsu'])}.</p>"
        )
    parts.append(f"<p class=verdict>{html.escape(verdict(summary.bench))}</p>")
    return parts


def _wall_clock(bench: dict[str, Any]) -> list[str]:
    parts = [_table(speed_rows(bench))]
    if bench.get("best"):
        parts.append(f"<p class=key>{SPEED_NOTE}</p>")
    for heading, rows in (
        ("Between paths, over all prompts:", comparison_rows(bench)),
        ("Peak memory of a process that runs this path alone:", memory_rows(bench)),
    ):
        if rows:
            parts += [f"<p>{heading}</p>", _table(rows)]
    return parts


def _greedy_sentence(evaluation: dict[str, Any]) -> str:
    same, total = evaluation["greedy_identical"], evaluation["greedy_prompts"]
    text = f"Greedy output is the target's own, token for token, on {same} of {total} prompts."
    ties = sum(d["tie"] for d in evaluation["greedy_differences"])
    if ties:
        text += f" {ties} of the others part at a tie of the target's own logits."
    if same + ties < total:
        text += " The rest is a fault: please report it."
    return f"<p>{text}</p>"


def _table(rows: list[dict[str, str]]) -> str:
    if not rows:
        return ""
    head = "".join(f"<th>{html.escape(key)}</th>" for key in rows[0])
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(value)}</td>" for value in row.values()) + "</tr>"
        for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _image(path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{html.escape(path.stem)}" src="data:image/png;base64,{data}">'
