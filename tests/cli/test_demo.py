"""`fastdraft demo`: what it prints, on a terminal and into a pipe, and what it refuses."""

import dataclasses
import io
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from fastdraft_hf._atomic import write_json
from fastdraft_hf._errors import FastDraftError
from fastdraft_hf.cli import demo
from fastdraft_hf.cli import main as cli
from fastdraft_hf.cli.demo import find_draft
from fastdraft_hf.data.task_sets import Decontaminator
from fastdraft_hf.decode.settings import store_draft_settings
from fastdraft_hf.eval.bench import Models, Setting, load_engine
from fastdraft_hf.eval.report import accepted_pieces
from fastdraft_hf.hub.folder import chat_mode
from fastdraft_hf.target.resolve import load_tokenizer

PROMPT = ("code", "the cat and the hat")
SIDES = Setting("ours"), Setting("ours", 3)


@pytest.fixture(scope="module")
def draft(tmp_path_factory: pytest.TempPathFactory, noisy_draft_folder: Path) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "noisy"
    shutil.copytree(noisy_draft_folder, folder)
    store_draft_settings(folder, 2)
    return folder


@pytest.fixture(scope="module")
def engine(tiny_target_folder: Path, draft: Path) -> Any:
    models = Models(str(tiny_target_folder), str(draft), stop_ids=[2])
    return load_engine(models, SIDES)


def screen(width: int = 120, terminal: bool = True, **given: Any) -> Console:
    colors: Any = "standard" if terminal else None
    given = {"force_terminal": terminal, "color_system": colors, "_environ": {}, **given}
    return Console(file=io.StringIO(), width=width, **given)


def shown(engine: Any, tokenizer: Any, console: Console, prompts: Any = (PROMPT,)) -> str:
    demo.show(engine, SIDES, prompts, tokenizer, console, 24)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_pipe_gets_plain_text(engine: Any, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    text = shown(engine, tiny_tokenizer, screen(terminal=False), [PROMPT, ("chat", "[red]on[/]")])
    assert "\x1b" not in text
    assert "--- prompt 1 of 2\nthe cat and the hat\n" in text
    assert "--- prompt 2 of 2\n[red]on[/]\n" in text
    assert text.count("outputs identical (24 tokens)") == 2
    assert re.search(r"acceptance rate 0\.\d\d, [\d.]+ tokens per target pass; [\d.]+ tok", text)
    assert "all 2 prompts: acceptance rate" in text
    heading = (
        r"--- target alone: [\d.]+ tokens/s, 24 tokens in 24 passes\n(.*?)\n--- with the draft"
    )
    answers = re.findall(heading, text, re.DOTALL)
    assert len(answers) == 2
    assert text.count(answers[0]) >= 2  # both sides show it


def test_green_tokens_are_the_accepted_ones(
    engine: Any, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    console = screen(10_000)
    (pair,) = demo.show(engine, SIDES, [PROMPT], tiny_tokenizer, console, 24)
    pieces = accepted_pieces(pair[1].tokens, pair[1].rounds, tiny_tokenizer.decode)
    text = demo.visible("".join(part for accepted, part in pieces if accepted))
    green = re.findall(r"\x1b\[32m(.*?)\x1b\[0m", console.file.getvalue(), re.DOTALL)  # type: ignore[attr-defined]
    assert "".join(green).split() == text.split() != []


def test_columns_panes_and_no_colors(engine: Any, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    wide, narrow = (
        shown(engine, tiny_tokenizer, screen(width, no_color=True)).splitlines()
        for width in (120, 60)
    )
    assert any("target alone:" in line and "with the draft:" in line for line in wide)
    assert not any("target alone:" in line and "with the draft:" in line for line in narrow)
    assert any("\x1b[4m" in line for line in wide)  # accepted tokens are underlined
    assert not any("\x1b[32m" in line for line in wide)


def test_where_outputs_differ_is_said(engine: Any, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    def differing(side: Setting, *given: Any) -> Any:
        record = engine(side, *given)
        tokens = [*record.tokens[:-1], 5 + (side == SIDES[0])]
        return dataclasses.replace(record, tokens=tokens)

    text = shown(differing, tiny_tokenizer, screen(terminal=False))
    assert "outputs differ from token 24 on" in text
    assert "identical" not in text


def test_a_model_does_not_steer_the_terminal() -> None:
    assert demo.visible("a\x1b[2Jb\r\x07\tc\n") == "a\ufffd[2Jb\ufffd\ufffd\tc\n".expandtabs(4)
    console = screen()
    answer = [(True, "\x1b]0;title\x07"), (False, "[red]x[/]")]
    console.print(demo.side_by_side(console, [("one", answer)]))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "\x1b]0" not in text
    assert "[red]x[/]" in text


def test_no_prompt_is_held_out() -> None:
    held_out = Decontaminator.of_task_sets()
    assert not any(held_out.overlaps(text) for _, text in demo.PROMPTS)
    assert {kind for kind, _ in demo.PROMPTS} == {"code", "chat"}


def test_the_command(
    tiny_target_folder: Path, draft: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["demo", "--target", str(tiny_target_folder), "--draft", str(draft)]
    words += ["--engine", "transformers", "--max-new-tokens", "8"]
    assert cli.main([*words, "--prompt", "why: [the cat]"]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert out.startswith("PyTorch on cpu, greedy, 2 tokens drafted per round")
    assert "--- prompt 1 of 1\nwhy: [the cat]\n" in out
    assert "outputs identical" in out


def test_bad_input_is_one_line_before_any_work(
    tiny_target_folder: Path,
    draft: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        "fastdraft_hf.cli.demo.load_engine", lambda *given: pytest.fail("a model was loaded")
    )
    other = Path(shutil.copytree(draft, tmp_path / "other"))
    tokenizer = AutoTokenizer.from_pretrained(other)
    tokenizer.add_tokens(["<|more|>"])
    tokenizer.save_pretrained(other)
    here = ["--target", str(tiny_target_folder), "--draft", str(draft)]
    for words, message in (
        ([*here, "--max-new-tokens", "0"], "max_new_tokens: must be at least 1, got 0"),
        ([*here, "--num-assistant-tokens", "0"], "num_assistant_tokens: must be at least 1"),
        ([*here[:3], str(other)], "its vocabulary is not the target's"),
        ([*here[:3], str(tmp_path / "none")], f"draft: the folder {tmp_path / 'none'} does not"),
        (["--draft", str(draft), "--target", "embedded:smol"], "target: no embedded model"),
    ):
        assert cli.main(["demo", *words]) == 2, words
        said = capsys.readouterr()
        assert message in said.err, said.err
        assert said.err.count("\n") == 1
        assert said.out == ""


def test_the_draft_is_found(draft: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(draft, tmp_path / "run" / "draft")
    assert find_draft(str(tmp_path / "run")) == tmp_path / "run" / "draft"
    assert find_draft(str(draft)) == draft
    monkeypatch.setattr(demo, "__file__", str(tmp_path / "fastdraft_hf" / "cli" / "demo.py"))
    with pytest.raises(FastDraftError, match="this installation has none; give --draft"):
        find_draft(None)
    folder = tmp_path / "model_cards" / demo.SHIPPED
    shutil.copytree(draft, folder)
    assert find_draft(None) == folder


def test_chats_are_in_the_mode_of_the_drafts_own_record(
    tiny_target_folder: Path, draft: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    thinking = Path(shutil.copytree(draft, tmp_path / "thinking"))
    words = ["evaluate", "--target", str(tiny_target_folder), "--draft", str(thinking), "--dry-run"]
    for mode in ({"enable_thinking": False}, {"chat_template": "{{ 1 }}"}, {"tools": [1]}):
        write_json(thinking / "provenance.json", {"generate": {"chat_template_kwargs": mode}})
        if "enable_thinking" in mode:
            assert chat_mode(thinking) == mode
            assert cli.main([*words]) == 0
            assert yaml.safe_load(capsys.readouterr().out)["chat_template_kwargs"] == mode
            continue
        for command in (words, ["demo", *words[1:-1]]):  # it came with the draft, from anywhere
            assert cli.main(command) == 2
            assert "chat_template_kwargs must be plain values" in capsys.readouterr().err
    template = "{{ messages[0].content }}{% if enable_thinking is false %} quiet{% endif %}"
    target = Path(shutil.copytree(tiny_target_folder, tmp_path / "target"))
    tokenizer = AutoTokenizer.from_pretrained(target)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(target)
    chat = [{"role": "user", "content": "why"}]
    for mode, text in (({}, "why"), ({"enable_thinking": False}, "why quiet")):
        assert load_tokenizer(target, mode=mode).apply_chat_template(chat, tokenize=False) == text
