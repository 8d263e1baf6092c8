from __future__ import annotations

import base64
import html
import io
import json
import re
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from PIL import Image
from transformers import PreTrainedTokenizerBase

from fastdraft_hf.eval import figures
from fastdraft_hf.eval.report import (
    accepted_pieces,
    draw_figures,
    marked_sample,
    snippet,
    write_report,
)
from fastdraft_hf.eval.summary import SPEED_NOTE, RunSummary, settings_of

PNG = b"\x89PNG\r\n\x1a\n"


def write(summary: RunSummary, folder: Path, **given: Any) -> str:
    fields: dict[str, Any] = {
        "title": "A draft for <target> & co",
        "machine": "a machine",
        "target": "org/target",
        "draft_location": "runs/draft",
        "samples": [],
        "resolved_recipe": "target: org/target\n",
        "further": "more tokens & more hours",
        **given,
    }
    path = write_report(summary, folder, **fields)
    assert path == folder / "report.html"
    return path.read_text(encoding="utf-8")


class Page(HTMLParser):
    """Collects what a page would load and checks that tags are closed in order."""

    VOID = {"meta", "img", "br", "link"}

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.loaded: list[str] = []
        self.tags: list[str] = []
        self.text: list[str] = []
        self._open: list[str] = []
        self.feed(page)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loaded += [value or "" for name, value in attrs if name in ("src", "href", "data")]
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_figures_are_pictures(run_summary: RunSummary, tmp_path: Path) -> None:
    made = draw_figures(run_summary, tmp_path)
    assert [path.name for path in made] == ["losses.png", "acceptance.png", "speed.png"]
    for path in made:
        with Image.open(path) as image:
            assert image.format == "PNG"
            assert image.size == (832, 494)
            assert len(image.convert("RGB").getcolors(2**20)) > 10  # something is drawn


def test_wall_clock_is_drawn_for_every_path(
    run_summary: RunSummary, bench_results: dict[str, Any], tmp_path: Path
) -> None:
    run_summary.bench = bench_results
    made = draw_figures(run_summary, tmp_path)
    assert [p.name for p in made][2:] == ["speed.png", "wall_clock.png"]
    for path in made:
        with Image.open(path) as image:
            assert image.width == 832
            assert len(image.convert("RGB").getcolors(2**20)) > 10
    # An engine that does not tell its first token, and three task sets: still figures.
    for found in bench_results["paths"].values():
        found["tasks"]["third"] = found["overall"]
        found["overall"]["alone_first_token_seconds"] = None
        for sweep in found["overall"]["sweep"].values():
            sweep["first_token_seconds"] = None
    assert len(draw_figures(run_summary, tmp_path)) == 4


def test_every_interval_is_inside_its_panel(
    run_summary: RunSummary,
    bench_results: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Panels share an axis, so the widest interval may be in any of them."""
    run_summary.bench = bench_results
    tasks = bench_results["paths"]["ours"]["tasks"]
    tasks["ifbench"] = json.loads(json.dumps(tasks["ifbench"]))
    tasks["ifbench"]["sweep"]["3"]["ratio"] = [3.0, 2.0, 7.5]
    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path: drawn.append(figure))
    figures.speed(run_summary, tmp_path / "speed.png")
    assert [panel.get_title() for panel in drawn[0].axes] == ["humaneval", "ifbench"]
    for panel in drawn[0].axes:
        low, high = panel.get_ylim()
        assert low == 0
        assert high > 7.5


def test_the_report_tells_all_a_benchmark_found(
    run_summary: RunSummary, bench_results: dict[str, Any], tmp_path: Path
) -> None:
    run_summary.bench = bench_results
    parsed = Page(write(run_summary, tmp_path))
    assert len(parsed.loaded) == 4
    shown = "".join(parsed.text)
    assert SPEED_NOTE in shown
    assert "The fastest setting is openvino with γ = 1" in shown
    assert "Between paths" in shown
    assert "peak memory, GiB" in shown


def test_a_run_without_data_has_no_figures(tmp_path: Path) -> None:
    assert draw_figures(RunSummary(None, None, {}, {}), tmp_path) == []
    empty = RunSummary(None, {"paths": {}}, {}, {})
    assert draw_figures(empty, tmp_path) == []
    assert list(tmp_path.iterdir()) == []


def test_an_interval_may_miss_its_value(run_summary: RunSummary, tmp_path: Path) -> None:
    """Resampled sums are added in another order, so a bound can pass the value by a rounding."""
    assert run_summary.bench is not None
    sweep = run_summary.bench["paths"]["openvino"]["tasks"]["humaneval"]["sweep"]
    sweep["1"]["ratio"] = [1.5, 1.5 + 2.3e-16, 1.5 + 2.3e-16]
    figures.speed(run_summary, tmp_path / "speed.png")
    assert (tmp_path / "speed.png").read_bytes().startswith(PNG)


def test_losses_can_be_drawn_before_any_line_with_a_loss(tmp_path: Path) -> None:
    log = [{"step": 3, "eval_loss": 5.0}]
    figures.losses(RunSummary(None, None, {}, {"align": log}), tmp_path / "losses.png")
    assert (tmp_path / "losses.png").read_bytes().startswith(PNG)


def test_the_report_is_one_page_that_loads_nothing(run_summary: RunSummary, tmp_path: Path) -> None:
    page = write(run_summary, tmp_path)
    parsed = Page(page)
    assert len(parsed.loaded) == 3
    for source in parsed.loaded:
        head, _, data = source.partition(",")
        assert head == "data:image/png;base64"
        with Image.open(io.BytesIO(base64.b64decode(data, validate=True))) as image:
            image.verify()
    assert not {"script", "link", "iframe", "object"} & set(parsed.tags)
    assert "@import" not in page
    assert "url(" not in page
    shown = "".join(parsed.text)
    assert "A draft for <target> & co" in shown
    assert "more tokens & more hours" in shown
    assert "0.400 (0.300 to 0.500)" in shown  # acceptance, and its interval
    assert "1.50x (1.40 to 1.60) at γ = 3: a speed-up" in shown
    assert snippet("org/target", "runs/draft") in shown
    assert "target: org/target" in shown
    assert json.dumps("9.9.9") in shown  # a version


def test_the_report_says_how_greedy_answers_compare(
    run_summary: RunSummary, tmp_path: Path
) -> None:
    assert run_summary.evaluation is not None
    assert "token for token, on 4 of 4 prompts.</p>" in write(run_summary, tmp_path)
    tie = {"task": "ifbench", "key": "1", "place": 3, "margin": 1e-5, "tie": True}
    run_summary.evaluation.update(greedy_identical=3, greedy_differences=[tie])
    page = write(run_summary, tmp_path)
    assert "on 3 of 4 prompts. 1 of the others part at a tie" in page
    assert "fault" not in page
    fault = {**tie, "margin": 2.0, "tie": False}
    run_summary.evaluation.update(greedy_identical=2, greedy_differences=[tie, fault])
    assert "The rest is a fault: please report it." in write(run_summary, tmp_path)


def test_both_estimates_and_what_training_read_are_told(
    run_summary: RunSummary, tmp_path: Path
) -> None:
    evaluation = run_summary.evaluation
    assert evaluation is not None
    evaluation["settings"] = settings_of(evaluation)
    for setting in evaluation["settings"][:1]:
        for found in (*setting["tasks"].values(), setting["overall"]):
            found["expected"] = {"acceptance_rate": [0.42, 0.41, 0.43]}
            found["intervals_overlap"] = True
    evaluation["not_held_out"] = ["<mine>"]
    text = "".join(Page(write(run_summary, tmp_path)).text)
    assert "0.420 (0.410 to 0.430)" in text
    assert "Its interval overlaps that of decoding in 3 of 3 rows." in text
    assert "Training did not leave out the text of <mine>" in text


def test_an_unmeasured_run_has_a_report_too(tmp_path: Path) -> None:
    page = write(RunSummary(None, None, {}, {}), tmp_path)
    assert "Wall clock was not measured." in "".join(Page(page).text)


def test_text_of_models_is_escaped(run_summary: RunSummary, tmp_path: Path) -> None:
    evil = "<script>alert('x')</script> & <img src=http://example.invalid/a>"
    body = coloured_sample([1, 2, 3], [(2, 1), (2, 0)], lambda ids: evil if 2 in ids else "ok")
    page = write(
        run_summary,
        tmp_path,
        samples=[(f"humaneval {evil}", body)],
        resolved_recipe=f"target: '{evil}'\n",
        machine=evil,
        title=evil,
        further=evil,
    )
    parsed = Page(page)
    assert "script" not in parsed.tags
    assert len(parsed.loaded) == 3
    assert all(source.startswith("data:") for source in parsed.loaded)
    assert "".join(parsed.text).count("alert('x')") >= 5


def coloured_sample(tokens: Sequence[int], rounds: Any, decode: Any) -> str:
    return marked_sample(accepted_pieces(tokens, rounds, decode))


def stripped(sample: str) -> str:
    return html.unescape(re.sub(r"</?span[^>]*>", "", sample))


def rounds_for(tokens: Sequence[int], accepted: Sequence[int]) -> list[tuple[int, int]]:
    """Cut an answer into rounds that accept as given, as many as it takes."""
    rounds, place = [], 0
    for count in [*accepted, *[0] * len(tokens)]:
        if place >= len(tokens):
            break
        count = min(count, len(tokens) - place - 1)
        rounds.append((max(count, 1), count))
        place += count + 1
    return rounds


ACCEPTED = st.lists(st.integers(0, 5), max_size=20)


@given(st.text("ab<>&\"'\n é😀", max_size=40), ACCEPTED)
def test_a_sample_shows_the_answer_and_marks_what_was_drafted(
    text: str, accepted: list[int]
) -> None:
    tokens = [ord(c) for c in text]
    rounds = rounds_for(tokens, accepted)
    sample = coloured_sample(tokens, rounds, lambda ids: "".join(map(chr, ids)))
    assert stripped(sample) == text
    marked = re.findall(r'<span class="accepted">(.*?)</span>', sample, flags=re.DOTALL)
    expected, place = [], 0
    for _, count in rounds:
        expected += [text[place : place + count]] if count else []
        place += count + 1
    assert [html.unescape(piece) for piece in marked] == expected


@given(st.text(max_size=12), ACCEPTED)
@example("a 😀 smile — naïve 日本語", [1, 0, 2, 0, 1, 3])
def test_a_sample_of_a_real_tokenizer_shows_the_answer(
    target_tokenizer: PreTrainedTokenizerBase, text: str, accepted: list[int]
) -> None:
    """A character may take several tokens, of which some were drafted."""
    tokens = target_tokenizer(text, add_special_tokens=False)["input_ids"]
    sample = coloured_sample(tokens, rounds_for(tokens, accepted), target_tokenizer.decode)
    assert stripped(sample) == target_tokenizer.decode(tokens)


def test_tokens_without_rounds_are_shown_plain() -> None:
    assert coloured_sample([65, 66], [], lambda ids: "".join(map(chr, ids))) == "AB"
    assert coloured_sample([], [], lambda ids: "".join(map(chr, ids))) == ""


@pytest.mark.parametrize("name", ["transformers", "openvino"])
def test_one_path_alone_can_be_drawn(run_summary: RunSummary, tmp_path: Path, name: str) -> None:
    assert run_summary.bench is not None
    run_summary.bench["paths"] = {name: run_summary.bench["paths"]["openvino"]}
    figures.speed(run_summary, tmp_path / "speed.png")
    assert (tmp_path / "speed.png").stat().st_size > 5000
