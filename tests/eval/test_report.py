"""Figures and the report's page: complete, self-contained, and nothing live in it."""

from __future__ import annotations

import base64
import io
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image
from transformers import PreTrainedTokenizerBase

from fastdraft_hf.eval.report import accepted_pieces, draw_figures, snippet, write_report
from fastdraft_hf.eval.summary import SPEED_NOTE, RunSummary


def write(summary: RunSummary, folder: Path, **given: Any) -> Page:
    fields: dict[str, Any] = {
        "title": "A draft for <target> & co",
        "machine": "a machine",
        "target": "org/target",
        "draft_location": "runs/draft",
        "samples": [],
        "recipe": "target: org/target\n",
        "further": "more tokens & more hours",
        **given,
    }
    path = write_report(summary, folder, **fields)
    assert path == folder / "report.html"
    return Page(path.read_text(encoding="utf-8"))


class Page(HTMLParser):
    """What a page would load and show; its tags must be closed in order."""

    VOID = {"meta", "img", "br", "link"}

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.loaded: list[str] = []
        self.tags: list[str] = []
        self._text: list[str] = []
        self._open: list[str] = []
        self.feed(page)
        self.close()
        assert self._open == []
        self.text = "".join(self._text)
        self.source = page

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loaded += [value or "" for name, value in attrs if name in ("src", "href", "data")]
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self._text.append(data)


def test_every_figure_is_drawn(
    run_summary: RunSummary, bench_results: dict[str, Any], tmp_path: Path
) -> None:
    run_summary.bench = bench_results
    made = draw_figures(run_summary, tmp_path)
    names = ["losses.png", "acceptance.png", "speed.png"]
    assert [path.name for path in made] == names
    for path in made:
        with Image.open(path) as image:
            assert image.width == 832
            assert len(image.convert("RGB").getcolors(2**20)) > 10  # something is drawn


def test_a_run_without_data_has_no_figures(tmp_path: Path) -> None:
    assert draw_figures(RunSummary(None, {"paths": {}}, {}, {}), tmp_path) == []
    page = write(RunSummary(None, None, {}, {}), tmp_path)
    assert "Wall clock was not measured." in page.text
    log = [{"step": 3, "eval_loss": 5.0}]  # before any line with a training loss
    assert len(draw_figures(RunSummary(None, None, {}, {"align": log}), tmp_path)) == 1


def test_the_report_is_one_page_that_loads_nothing(
    run_summary: RunSummary, bench_results: dict[str, Any], tmp_path: Path
) -> None:
    run_summary.bench = bench_results
    evaluation = run_summary.evaluation
    assert evaluation is not None
    for figures_ in (
        *evaluation["settings"][0]["tasks"].values(),
        evaluation["settings"][0]["overall"],
    ):
        figures_["expected"] = {"acceptance_rate": [0.42, 0.41, 0.43]}
    evaluation["not_held_out"] = ["<mine>"]
    evaluation["prompts"]["drawn"] = 9
    page = write(run_summary, tmp_path, card="# The card\n")
    assert len(page.loaded) == 3
    for source in page.loaded:
        head, _, data = source.partition(",")
        assert head == "data:image/png;base64"
        with Image.open(io.BytesIO(base64.b64decode(data, validate=True))) as image:
            image.verify()
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert "@import" not in page.source
    assert "url(" not in page.source
    for said in (
        "A draft for <target> & co",
        "more tokens & more hours",
        "0.400 (0.300 to 0.500)",  # acceptance, and its interval
        "0.420 (0.410 to 0.430)",  # the expected one
        "Training did not leave out the text of <mine>",
        "cut this to 4 of 9 prompts",
        "Greedy output is identical to the target alone on 4 of 4 prompts.",
        "1.50x (1.40 to 1.60) the speed of the target alone through the same kernels",
        SPEED_NOTE,
        "1.10 (1.00 to 1.20)",  # our kernels
        snippet("org/target", "runs/draft"),
        "target: org/target",
        "# The card",
        json.dumps("9.9.9"),  # a version
    ):
        assert said in page.text, said


def test_text_of_models_is_escaped(run_summary: RunSummary, tmp_path: Path) -> None:
    evil = "<script>alert('x')</script> & <img src=http://example.invalid/a>"
    pieces = accepted_pieces([1, 2, 3], [(2, 1), (2, 0)], lambda ids: evil if 2 in ids else "ok")
    page = write(
        run_summary,
        tmp_path,
        samples=[(f"humaneval {evil}", pieces)],
        recipe=f"target: '{evil}'\n",
        machine=evil,
        title=evil,
        further=evil,
        card=evil,
    )
    assert "script" not in page.tags
    assert all(source.startswith("data:") for source in page.loaded)
    assert page.text.count("alert('x')") >= 6


@given(st.text(max_size=12), st.lists(st.integers(0, 5), max_size=20))
@example("a 😀 smile — naïve 日本語", [1, 0, 2, 0, 1, 3])
def test_accepted_tokens_are_marked_and_no_character_is_cut(
    target_tokenizer: PreTrainedTokenizerBase, text: str, accepted: list[int]
) -> None:
    tokens = target_tokenizer(text, add_special_tokens=False)["input_ids"]
    rounds, marked, position = [], list[int](), 0
    for count in [*accepted, *[0] * len(tokens)]:
        if position < len(tokens):
            count = min(count, len(tokens) - position - 1)
            rounds.append((max(count, 1), count))
            marked += range(position, position + count)
            position += count + 1
    pieces = accepted_pieces(tokens, rounds, target_tokenizer.decode)
    assert "".join(part for _, part in pieces) == target_tokenizer.decode(tokens)
    pieces = accepted_pieces(tokens, rounds, lambda ids: "x" * len(ids))  # one letter per token
    shown = [yes for yes, part in pieces for _ in part]
    assert [n for n, yes in enumerate(shown) if yes] == marked
