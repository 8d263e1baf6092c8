"""A run's report: one self-contained HTML page, with its figures beside it as PNG."""

from __future__ import annotations

import base64
import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from fastdraft_hf._card import python
from fastdraft_hf.eval.figures import draw_figures
from fastdraft_hf.eval.summary import (
    KERNELS_NOTE,
    SPEED_NOTE,
    RunSummary,
    acceptance_rows,
    acceptance_sentences,
    cut_sentence,
    kernel_rows,
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
        summary: the run's records.
        folder: where to write.
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
        kernels=kernel_rows(bench or {}),
        kernels_note=KERNELS_NOTE,
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
