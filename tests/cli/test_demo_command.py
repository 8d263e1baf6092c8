"""`fastdraft demo` as a user types it: what it prints, and what it refuses before any work."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from fastdraft_hf.cli import main as cli
from fastdraft_hf.decode.settings import store_draft_settings


@pytest.fixture
def draft(
    tmp_path: Path,
    tiny_model: Callable[..., LlamaForCausalLM],
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> Path:
    folder = tmp_path / "draft"
    tiny_model(seed=0, num_hidden_layers=1).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    store_draft_settings(folder, 2)
    return folder


def test_a_prompt_is_answered_twice(
    tiny_target_folder: Path, draft: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["demo", "--target", str(tiny_target_folder), "--draft", str(draft)]
    words += ["--engine", "transformers", "--max-new-tokens", "8"]
    assert cli.main([*words, "--prompt", "why: [the cat]"]) == 0
    said = capsys.readouterr()
    assert "\x1b" not in said.out
    assert said.out.startswith("transformers, ")
    assert "greedy, 2 tokens drafted a round" in said.out
    assert "--- 1 of 1, a prompt\nwhy: [the cat]\n" in said.out
    assert "--- the target alone: " in said.out
    assert "--- with the draft: " in said.out
    assert "outputs identical" in said.out
    assert "fastdraft bench" in said.out
    assert "loading both models ..." in said.err


def test_bad_input_is_one_line_before_any_work(
    tiny_target_folder: Path,
    draft: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def loaded(*args: object, **given: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("fastdraft_hf.eval.demo.engine.load_engine", loaded)
    other = Path(shutil.copytree(draft, tmp_path / "other"))
    tokenizer = AutoTokenizer.from_pretrained(other)
    tokenizer.add_tokens(["<|more|>"])
    tokenizer.save_pretrained(other)
    (tmp_path / "run" / "align").mkdir(parents=True)
    (tmp_path / "run" / "align" / "provenance.json").write_text("{}", encoding="utf-8")
    (tmp_path / "empty").mkdir()
    here = ["--target", str(tiny_target_folder), "--draft", str(draft)]
    for words, message in (
        ([*here, "--prompt", "  "], "prompt: it is empty"),
        ([*here, "--max-new-tokens", "0"], "max_new_tokens: must be at least 1, got 0"),
        ([*here, "--num-assistant-tokens", "0"], "num_assistant_tokens: must be at least 1"),
        ([*here, "--temperature", "-1"], "temperature: must be 0 or more, got -1"),
        ([*here, "--engine", "vino"], "engine: 'vino' is not one of auto, openvino, transformers"),
        ([*here[:3], str(other)], "its vocabulary is not the target's"),
        ([*here[:3], str(tmp_path / "none")], f"draft: there is no folder {tmp_path / 'none'}"),
        ([*here[:3], str(tmp_path / "empty")], "is neither a run's folder nor a draft's"),
        ([*here[:3], str(tmp_path / "run")], "holds no finished draft yet"),
        (["--draft", str(draft), "--target", "embedded:smol"], "target: no embedded model"),
    ):
        assert cli.main(["demo", *words]) == 2, words
        said = capsys.readouterr()
        assert message in said.err, said.err
        assert said.err.count("\n") == 1
        assert said.err.startswith("fastdraft: ")
        assert said.out == ""


def test_a_run_is_as_good_as_its_draft(
    tiny_target_folder: Path, draft: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """``--draft RUN`` finds the draft, and engine openvino the export that the run made."""
    from fastdraft_hf.cli.demo import _draft

    exported = tmp_path / "export" / "openvino-int8"
    exported.mkdir(parents=True)
    (exported / "openvino_model.xml").write_text("<xml/>", encoding="utf-8")
    (tmp_path / "recipe.yaml").write_text("", encoding="utf-8")
    assert _draft(str(tmp_path)) == (draft, exported)
    assert _draft(str(draft)) == (draft, exported.resolve())


def test_make_demo_is_the_command() -> None:
    text = (Path(__file__).parents[2] / "Makefile").read_text(encoding="utf-8")
    assert "demo: $(VENV)/.run\n\t$(VENV)/bin/fastdraft demo $(DEMO_ARGS)\n" in text
    assert "make demo " in text
