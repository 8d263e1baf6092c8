"""The demonstration: what is coloured is what was accepted, and what a terminal or a log gets."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
import yaml
from hypothesis import strategies as st
from rich.console import Console
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedTokenizerFast

from fastdraft_hf._errors import FastDraftError
from fastdraft_hf._extras import openvino_available
from fastdraft_hf._sequences import first_difference
from fastdraft_hf.data.decontaminate import Decontaminator
from fastdraft_hf.data.heldout import TASK_NAMES, load_task
from fastdraft_hf.decode.live import LiveText, Piece, decode_live
from fastdraft_hf.eval.demo import engine as engines
from fastdraft_hf.eval.demo.config import DemoConfig
from fastdraft_hf.eval.demo.engine import Engine, check_draft, load_engine, shipped_draft
from fastdraft_hf.eval.demo.prompts import PROMPTS, DemoPrompt
from fastdraft_hf.eval.demo.show import agreement, show
from fastdraft_hf.eval.demo.view import ALONE, WITH_DRAFT, Pane, answer_text, frame, visible

PAGE = Path(__file__).resolve().parents[2] / "docs" / "demo.md"
PROMPT = DemoPrompt("a prompt", "the cat and the hat", "code")
SHORT = DemoConfig(max_new_tokens=24)

TinyModel = Callable[..., LlamaForCausalLM]


@pytest.fixture(scope="module")
def tiny_engine(tiny_model: TinyModel, tiny_tokenizer: PreTrainedTokenizerFast) -> Engine:
    """A target and a draft that is right now and then: the target with noise on its weights."""
    draft = tiny_model(seed=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in draft.parameters():
            if parameter.dim() > 1:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(0.1 * parameter.std() * noise)
    return Engine("transformers, float32", tiny_model(seed=0), draft, tiny_tokenizer, 3)


def screen(width: int = 120, height: int = 30, **given: Any) -> Console:
    given = {"force_terminal": True, "_environ": {}, **given}
    colours: Any = "standard" if given["force_terminal"] else "auto"
    return Console(file=io.StringIO(), width=width, height=height, color_system=colours, **given)


def printed(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def drawn(width: int, panes: list[Pane], **given: Any) -> list[str]:
    console = screen(width, force_terminal=False)
    console.print(frame(console, "def add(a, b):", panes, **given))
    return [line.rstrip() for line in printed(console).splitlines()]


def pieces(*words: tuple[str, bool]) -> list[Piece]:
    return [Piece(number, text, accepted) for number, (text, accepted) in enumerate(words)]


# ------------------------------------------------------------------------------------- the record


def simulated(target: Any, draft: Any, ids: list[int], tokens: list[int], gamma: int) -> list[bool]:
    """Say which tokens of a greedy answer the draft would have proposed in the target's place.

    From the definition, with a fresh pass of the draft for every drafted token and nothing of the
    decoding loop.
    """
    accepted: list[bool] = []
    while len(accepted) < len(tokens):
        place = len(accepted)
        # A round drafts no more than leaves room for the target's own token.
        for _ in range(min(gamma, len(tokens) - place - 1)):
            text = torch.tensor([[*ids, *tokens[: len(accepted)]]])
            with torch.inference_mode():
                best = int(draft(input_ids=text).logits[0, -1].argmax())
            if best != tokens[len(accepted)]:
                break
            accepted.append(True)
        accepted.append(False)
    return accepted


def check_colours(engine: Engine, ids: list[int], live: LiveText, accepted: list[bool]) -> None:
    """The pieces, and what a terminal gets in green, against a simulation of the decoding."""
    tokens = [piece.token for piece in live.pieces]
    assert [p.accepted for p in live.pieces] == accepted
    assert "".join(p.text for p in live.pieces) == engine.tokenizer.decode(
        tokens, skip_special_tokens=True
    )
    console = screen(10_000)
    console.print(answer_text(live.pieces, "green"), soft_wrap=True, end="")
    green = "".join(re.findall(r"\x1b\[32m(.*?)\x1b\[0m", printed(console), re.DOTALL))
    # Line breaks have no colour, whoever wrote them.
    accepted_text = visible("".join(p.text for p in live.pieces if p.accepted))
    assert green.split() == accepted_text.split()


@pytest.mark.parametrize("path", ["ours", "transformers"])
@pytest.mark.parametrize("gamma", [1, 3, 5])
def test_the_coloured_tokens_are_the_accepted_ones(
    tiny_engine: Engine, path: Any, gamma: int
) -> None:
    ids = list(PROMPT.ids(tiny_engine.tokenizer, None))
    seen: list[int] = []
    record, live = decode_live(
        tiny_engine.target,
        tiny_engine.tokenizer,
        ids,
        key="one",
        max_new_tokens=24,
        temperature=0.0,
        seed=0,
        draft=tiny_engine.draft,
        num_assistant_tokens=gamma,
        path=path,
        changed=lambda text: seen.append(len(text.pieces)),
    )
    expected = simulated(tiny_engine.target, tiny_engine.draft, ids, record.tokens, gamma)
    assert 0 < sum(expected) < len(expected)
    check_colours(tiny_engine, ids, live, expected)
    assert [p.token for p in live.pieces] == record.tokens
    assert live.passes == record.target_passes == len(record.rounds)
    if path == "ours":  # stock assisted generation may tell one too few at the end
        assert sum(p.accepted for p in live.pieces) == record.accepted
    assert seen == sorted(seen)
    assert seen[-1] == len(record.tokens)


def test_the_coloured_tokens_of_the_real_target(target_folder: Path) -> None:
    """The draft is the target without some of its last layers, on the same weights."""
    from transformers import AutoTokenizer

    target = AutoModelForCausalLM.from_pretrained(target_folder, dtype=torch.float32).eval()
    config = copy.deepcopy(target.config)
    config.num_hidden_layers = 27
    with torch.device("meta"):
        draft = LlamaForCausalLM(config).eval()
    weights = target.state_dict()
    draft.load_state_dict({name: weights[name] for name in draft.state_dict()}, assign=True)
    draft.model.rotary_emb = target.model.rotary_emb
    draft.tie_weights()
    engine = Engine("", target, draft, AutoTokenizer.from_pretrained(target_folder), 3)
    ids = list(engine.tokenizer("One, two, three, four, five, six, seven,")["input_ids"])
    config = DemoConfig(max_new_tokens=16)
    alone, plain = engine.answer(ids, config, key="one", with_draft=False)
    record, live = engine.answer(ids, config, key="one", with_draft=True)
    assert record.tokens == alone.tokens
    expected = simulated(target, draft, ids, record.tokens, 3)
    assert 0 < sum(expected) == record.accepted
    assert record.accepted < record.drafted
    check_colours(engine, ids, live, expected)
    assert not any(piece.accepted for piece in plain.pieces)
    assert plain.passes == len(plain.pieces) == 16
    assert "eight" in "".join(piece.text for piece in plain.pieces)


def test_the_clock_stands_still_while_the_terminal_is_drawn(
    tiny_engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a clock that only drawing moves, nothing is measured."""
    from fastdraft_hf.decode import assisted, live

    now = [0.0]

    class Clock:
        @staticmethod
        def perf_counter() -> float:
            return now[0]

    monkeypatch.setattr(live, "time", Clock)
    monkeypatch.setattr(assisted, "time", Clock)

    def draw(text: LiveText) -> None:
        now[0] += 1.0

    ids = PROMPT.ids(tiny_engine.tokenizer, None)
    for with_draft in (False, True):
        record, text = tiny_engine.answer(
            ids, SHORT, key="one", with_draft=with_draft, changed=draw
        )
        assert text.paused > 1
        assert record.seconds == text.seconds == 0.0


@hypothesis.given(st.text(max_size=20))
def test_the_tokens_texts_are_the_answer(
    tiny_tokenizer: PreTrainedTokenizerFast, text: str
) -> None:
    """Characters of several bytes come whole, with the last of their tokens."""
    tokens = tiny_tokenizer(text, add_special_tokens=False)["input_ids"]
    live = LiveText(tiny_tokenizer, assisted=False)
    live.put(torch.tensor([[1, 2, 3]]))  # the prompt
    for token in tokens:
        live.put(torch.tensor([token]))
    assert "".join(p.text for p in live.pieces) == tiny_tokenizer.decode(
        tokens, skip_special_tokens=True
    )
    assert [p.token for p in live.pieces] == tokens


def test_tokens_that_no_round_is_told_of_are_the_targets(
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    """Decoding can fall back to the target alone."""
    live = LiveText(tiny_tokenizer, assisted=True)
    live.put(torch.tensor([[1, 2, 3]]))
    live.put(torch.tensor([40]))
    live.put(torch.tensor([41]))
    live.end()
    assert [(p.token, p.accepted) for p in live.pieces] == [(40, False), (41, False)]


# ------------------------------------------------------------------------------------- the frames


def test_a_frame_of_two_columns() -> None:
    left = Pane(ALONE, pieces(("    return", False), (" a", False)), 12.0, 1.0, 2, True)
    right = Pane(WITH_DRAFT)

    def line(left: str, right: str) -> str:
        return f"│ {left:<46} ││ {right:<46} │"

    assert drawn(100, [left, right], whole=True) == [
        "╭─ prompt " + "─" * 89 + "╮",
        f"│ {'def add(a, b):':<96} │",
        "╰" + "─" * 98 + "╯",
        "╭─ the target alone: 12.0 tokens/s ──────────────╮"
        "╭─ with the draft: waits for its turn ───────────╮",
        line("    return a", ""),
        "╰─ 2 tokens, 2 passes, 1.0 s ────────────────────╯╰" + "─" * 48 + "╯",
        "accepted drafted tokens   the target's own tokens",
    ]


def test_panes_on_a_narrow_terminal() -> None:
    answer = pieces(("one two three four five six seven eight nine ten eleven", True))
    panes = [Pane(ALONE, answer, 9.0, 1.0, 1, True), Pane(WITH_DRAFT, answer, 9.5, 1.0, 1, True)]
    lines = drawn(40, panes, whole=True)
    assert max(map(len, lines)) == 40
    assert [n for n, line in enumerate(lines) if "tokens/s" in line] == [3, 7]
    assert lines[4:6] == [
        "│ one two three four five six seven    │",
        "│ eight nine ten eleven                │",
    ]


def test_a_frame_that_is_drawn_over_fits_the_terminal() -> None:
    """What scrolls off a terminal cannot be drawn over; the answers' ends are shown."""
    long = [Piece(n, f"line {n}\n", n % 2 == 0) for n in range(200)]
    panes = [Pane(ALONE, long, 1.0, 1.0, 1, True), Pane(WITH_DRAFT)]
    for width, height in ((120, 24), (120, 50), (80, 24), (60, 40)):
        console = screen(width, height, force_terminal=False)
        console.print(frame(console, "a prompt\n" * 30, panes))
        lines = printed(console).splitlines()
        assert len(lines) < height, (width, height)
        assert "line 199" in printed(console)
        assert "line 0 " not in printed(console)


def test_what_a_model_writes_does_not_steer_the_terminal() -> None:
    assert visible("a\x1b[2Jb\r\x07\tc\n") == "a\ufffd[2Jb\ufffd\ufffd\tc\n".expandtabs(4)
    console = screen()
    console.print(answer_text(pieces(("\x1b]0;title\x07", True), ("[red]x[/]", False)), "green"))
    assert "\x1b]0" not in printed(console)
    assert "[red]x[/]" in printed(console)


def test_without_colour_accepted_tokens_are_underlined() -> None:
    console = screen(no_color=True)
    panes = [Pane(ALONE), Pane(WITH_DRAFT, pieces((" a", True)), 1.0, 1.0, 1, True)]
    console.print(frame(console, "x", panes, whole=True))
    assert "\x1b[4m" in printed(console)
    assert "\x1b[32m" not in printed(console)


# -------------------------------------------------------------------------------- the whole thing


def test_a_log_gets_plain_text_and_the_summary(tiny_engine: Engine) -> None:
    console = screen(force_terminal=False)
    found = show(tiny_engine, [PROMPT, dataclasses.replace(PROMPT, text="on")], SHORT, console)
    text = printed(console)
    assert "\x1b" not in text
    assert "\r" not in text
    assert text.startswith("transformers, float32, greedy, 3 tokens drafted a round\n")
    assert "--- 1 of 2, a prompt\nthe cat and the hat\n" in text
    assert text.count("outputs identical (24 tokens)") == 2
    record = found[0].assisted
    rate, passes = record.accepted / record.drafted, 24 / record.target_passes
    assert f"acceptance rate {rate:.2f}, block efficiency {passes:.2f}, " in text
    assert re.search(r"[\d.]+ tokens/s alone, [\d.]+ with the draft: [\d.]+x", text)
    assert "all 2 prompts: " in text
    assert "outputs identical on 2 of 2 prompts" in text
    answer = "".join(piece.text for piece in found[0].pieces.pieces)
    assert text.count(visible(answer).rstrip()) >= 2


def test_a_terminal_gets_frames_and_the_whole_answer(
    tiny_engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastdraft_hf.eval.demo.show._FRAME_SECONDS", 0.0)
    console = screen(110, 20)
    show(tiny_engine, [PROMPT], SHORT, console)
    text = printed(console)
    assert "\x1b[?25l" in text  # the cursor is hidden while frames are drawn over
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")
    assert text.count("waits for its turn") > 5
    last = text[text.rindex("\x1b[?25h") :]
    assert "\x1b[32m" in last
    assert "24 tokens, 24 passes" in last
    assert "outputs identical (24 tokens)" in last
    assert "waits for its turn" not in last


def test_an_interrupt_gives_the_cursor_back(tiny_engine: Engine) -> None:
    class Interrupting:
        def __getattr__(self, name: str) -> Any:
            return getattr(tiny_engine, name)

        def answer(self, *args: Any, key: str, **given: Any) -> Any:
            if key != "warm-up" and given["with_draft"]:
                raise KeyboardInterrupt
            return tiny_engine.answer(*args, key=key, **given)

    console = screen(110, 20)
    with pytest.raises(KeyboardInterrupt):
        show(Interrupting(), [PROMPT], SHORT, console)  # type: ignore[arg-type]
    assert printed(console).rindex("\x1b[?25h") > printed(console).rindex("\x1b[?25l")


def test_sampled_answers_are_not_compared(tiny_engine: Engine) -> None:
    console = screen(force_terminal=False)
    config = DemoConfig(max_new_tokens=12, temperature=0.8)
    found = show(tiny_engine, [PROMPT], config, console)
    assert "sampled: the same distribution, so not the same text" in printed(console)
    assert "T = 0.8, 3 tokens drafted" in printed(console)
    assert found[0].parted is None
    again = show(tiny_engine, [PROMPT], config, screen(force_terminal=False))
    assert again[0].alone.tokens == found[0].alone.tokens  # of the same seed


def test_where_outputs_part_is_said(
    tiny_engine: Engine, tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert first_difference([1, 2, 3], [1, 2, 3]) is None
    assert first_difference([1, 2, 3], [1, 4, 3]) == 1
    assert first_difference([1, 2], [1, 2, 3]) == 2

    class Two(Engine):
        """An engine whose sides are two different targets."""

        def answer(self, ids: Any, config: Any, **given: Any) -> Any:
            if given["with_draft"]:
                other = dataclasses.replace(tiny_engine, target=tiny_model(seed=3))
                return other.answer(ids, config, **given)
            return tiny_engine.answer(ids, config, **given)

    engine = Two(**vars(tiny_engine))
    console = screen(force_terminal=False)
    (found,) = show(engine, [PROMPT], SHORT, console)
    assert found.parted is not None
    ids = [*PROMPT.ids(engine.tokenizer, None), *found.alone.tokens[: found.parted]]
    with torch.inference_mode():
        best = tiny_engine.target(torch.tensor([ids])).logits[0, -1].topk(2).values
    assert found.margin == pytest.approx(float(best[0] - best[1]), abs=1e-4)
    assert f"outputs part at token {found.parted + 1}, where" in printed(console)
    assert agreement([found, found]) == "outputs identical on 0 of 2 prompts"


# ------------------------------------------------------------------------------------ the prompts


def test_no_prompt_is_held_out() -> None:
    held_out = Decontaminator.of_task_sets()
    for prompt in PROMPTS:
        assert not held_out.overlaps(prompt.text), prompt.name
    for task in TASK_NAMES:  # and the check would have said so
        assert held_out.overlaps(load_task(task)[0].text)
    assert {prompt.kind for prompt in PROMPTS} == {"code", "instruction"}


def test_instructions_are_put_into_the_chat_template(
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    code, instruction = (DemoPrompt("x", "the cat", k) for k in ("code", "instruction"))
    plain = tuple(tiny_tokenizer("the cat")["input_ids"])
    assert code.ids(tiny_tokenizer, None) == plain == instruction.ids(tiny_tokenizer, False)
    asked = tiny_tokenizer.decode(instruction.ids(tiny_tokenizer, None))
    assert asked == "<|im_start|>user\nthe cat<|im_end|>\n<|im_start|>assistant\n"
    assert code.ids(tiny_tokenizer, True) == instruction.ids(tiny_tokenizer, None)


# ------------------------------------------------------------------------------------- the models


def test_gamma_comes_from_the_drafts_generation_config(
    tiny_target_folder: Path,
    tiny_model: TinyModel,
    tiny_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    draft = tiny_model(seed=1)
    draft.generation_config.num_assistant_tokens = 4
    draft.save_pretrained(tmp_path / "draft")
    tiny_tokenizer.save_pretrained(tmp_path / "draft")
    waited: list[str] = []

    def busy(label: str) -> Any:
        waited.append(label)
        return contextlib.nullcontext()

    def load(**given: Any) -> Engine:
        config = DemoConfig(**given)
        folders = tiny_target_folder, tmp_path / "draft"
        check_draft(folders[0], tiny_tokenizer, folders[1])
        return load_engine(
            "transformers", *folders, tiny_tokenizer, config, ends={0, 2}, device="cpu", busy=busy
        )

    engine = load()
    assert engine.num_assistant_tokens == 4
    assert load(num_assistant_tokens=2).num_assistant_tokens == 2
    assert engine.target.generation_config.eos_token_id == [0, 2]
    assert waited == ["loading both models"] * 2


def test_an_openvino_export_is_no_pytorch_draft(
    tiny_target_folder: Path, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    (tmp_path / "openvino_model.xml").write_text("<xml/>", encoding="utf-8")
    with pytest.raises(FastDraftError, match="wants the draft's PyTorch folder"):
        load_engine(
            "transformers",
            tiny_target_folder,
            tmp_path,
            tiny_tokenizer,
            DemoConfig(),
            ends={2},
            device="cpu",
        )


def test_the_engine_is_chosen_by_what_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "openvino_available", lambda: True)
    assert engines.choose_engine("auto", "cpu") == "openvino"
    assert engines.choose_engine("auto", "cuda") == "transformers"
    assert engines.choose_engine("transformers", "cpu") == "transformers"
    monkeypatch.setattr(engines, "openvino_available", lambda: False)
    assert engines.choose_engine("auto", "cpu") == "transformers"
    monkeypatch.setattr("fastdraft_hf.export.openvino.openvino_available", lambda: False)
    with pytest.raises(FastDraftError, match="OpenVINO is not installed"):
        engines.choose_engine("openvino", "cpu")


def test_the_shipped_draft_or_how_to_come_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "fastdraft_hf" / "evaluation" / "demo" / "engine.py"
    monkeypatch.setattr(engines, "__file__", str(place))
    with pytest.raises(FastDraftError, match="this installation has no draft of its own") as said:
        shipped_draft()
    assert "\n" not in str(said.value)
    folder = tmp_path / "model_cards" / "SmolLM2-135M-Instruct-FastDraft"
    folder.mkdir(parents=True)
    (tmp_path / "model_cards" / "template.md").write_text("", encoding="utf-8")
    with pytest.raises(FastDraftError, match="fastdraft ship RUN --to model_cards/SmolLM2-135M-I"):
        shipped_draft()
    (folder / "config.json").write_text("{}", encoding="utf-8")
    assert shipped_draft() == folder


@pytest.mark.slow
@pytest.mark.skipif(not openvino_available(), reason="the openvino extra is not installed")
def test_through_openvino(
    tiny_target_folder: Path,
    tiny_model: TinyModel,
    tiny_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two exports, then both sides through ``OVModelForCausalLM``."""
    monkeypatch.setenv("FASTDRAFT_CACHE", str(tmp_path / "cache"))
    tiny_model(seed=0, num_hidden_layers=1).save_pretrained(tmp_path / "draft")
    tiny_tokenizer.save_pretrained(tmp_path / "draft")
    config = DemoConfig(max_new_tokens=24)
    engine = load_engine(
        "openvino",
        tiny_target_folder,
        tmp_path / "draft",
        tiny_tokenizer,
        config,
        ends={2},
        device="cpu",
    )
    console = screen(force_terminal=False)
    (found,) = show(engine, [PROMPT], config, console)
    assert printed(console).startswith("OpenVINO int8, greedy, 3 tokens")
    assert found.assisted.drafted > 0
    assert len(found.pieces.pieces) == len(found.assisted.tokens)
    assert sum(p.accepted for p in found.pieces.pieces) == found.assisted.accepted
    assert engine.margin([1, 5, 9]) >= 0


def test_every_setting_is_documented_with_its_default() -> None:
    section = PAGE.read_text(encoding="utf-8").partition("## Settings")[2].partition("\n## ")[0]
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*?) \|", section, re.MULTILINE))
    fields = dict(DemoConfig())
    assert list(rows) == list(fields)
    for name, default in fields.items():
        shown = yaml.safe_load(rows[name].strip("`"))
        assert shown == ("empty" if default is None else default), name
