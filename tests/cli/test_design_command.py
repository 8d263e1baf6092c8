from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from fastdraft_hf.cli import tune
from fastdraft_hf.cli.main import main
from fastdraft_hf.tune.config import TuneConfig


def plan_folder(source: Path, folder: Path) -> Path:
    """A target's folder without its weights."""
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    return folder


def test_asking_writes_nothing(
    tiny_target_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    words = [
        "design",
        "--target",
        str(tiny_target_folder),
        "--params",
        "9k",
        "--width-multiple",
        "8",
    ]
    assert main([*words, "--num-hidden-layers", "1"]) == 0
    shown = capsys.readouterr()
    for word in ("layers", "width", "feed-forward", "embeddings", "tied", "bytes in bf16"):
        assert word in shown.err
    assert "nothing is written" in shown.err
    assert list(tmp_path.iterdir()) == []


def test_the_table_is_of_the_draft_that_is_written(
    tiny_target_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, target = tmp_path / "run", tmp_path / "target"
    shutil.copytree(tiny_target_folder, target)
    (target / "generation_config.json").write_text('{"eos_token_id": [2, 0]}')
    words = ["design", "--target", str(target), "--output-dir", str(out)]
    words += ["--params", "9k", "--width-multiple", "8", "--num-hidden-layers", "1"]
    assert main([*words, "--dry-run"]) == 0
    assert not out.exists()
    planned = capsys.readouterr().err
    assert main(words) == 0
    made = capsys.readouterr().err
    draft = AutoModelForCausalLM.from_pretrained(out / "design")
    ours, theirs = (AutoTokenizer.from_pretrained(f) for f in (out / "design", target))
    assert ours.get_vocab() == theirs.get_vocab()
    assert ours.chat_template == theirs.chat_template is not None
    assert draft.generation_config.eos_token_id == [2, 0]  # the target's ends of a turn
    rows = [line.split() for line in planned.splitlines() if line.split()[:1] == ["all"]]
    assert rows[0][1] == f"{draft.num_parameters():,}"
    assert rows == [line.split() for line in made.splitlines() if line.split()[:1] == ["all"]]


def test_a_target_without_weights_gets_a_plan(
    tiny_target_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    target, out = plan_folder(tiny_target_folder, tmp_path / "target"), tmp_path / "run"
    words = [
        "design",
        "--target",
        str(target),
        "--output-dir",
        str(out),
        "--params",
        "9k",
        "--width-multiple",
        "8",
    ]
    assert main(words) == 0
    assert "only the draft's config is written" in caplog.text
    design = out / "design"
    assert not list(design.glob("*.safetensors"))
    config = AutoConfig.from_pretrained(design)
    assert config.architectures == ["LlamaForCausalLM"]
    assert config.vocab_size == len(AutoTokenizer.from_pretrained(design))
    facts = json.loads((design / "provenance.json").read_text())["facts"]
    assert facts["init"] is None
    assert facts["draft_parameters"] <= 9000


def test_pickled_weights_are_still_refused(
    tiny_target_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = plan_folder(tiny_target_folder, tmp_path / "target")
    (target / "pytorch_model.bin").write_bytes(b"")
    words = ["design", "--target", str(target), "--output-dir", str(tmp_path / "run")]
    assert main(words) == 2
    assert "pickled weights are not loaded" in capsys.readouterr().err


def test_a_given_draft_is_resized_on_request(
    tiny_target_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # The draft's head is padded by eight rows; the tokens are the same.
    draft = AutoModelForCausalLM.from_pretrained(tiny_target_folder)
    rows = draft.config.vocab_size
    draft.resize_token_embeddings(rows + 8, mean_resizing=False)
    given = tmp_path / "given"
    draft.save_pretrained(given)
    AutoTokenizer.from_pretrained(tiny_target_folder).save_pretrained(given)
    words = ["design", "--target", str(tiny_target_folder), "--draft", str(given)]
    assert main([*words, "--output-dir", str(tmp_path / "one")]) == 2
    error = capsys.readouterr().err
    assert f"design.draft: {given}: its vocabulary has not the target's rows" in error
    assert f"the heads score {rows} and {rows + 8} ids: padding" in error
    assert "--resize" in error
    out = tmp_path / "two"
    assert main([*words, "--output-dir", str(out), "--resize"]) == 0
    made = AutoModelForCausalLM.from_pretrained(out / "design")
    assert made.config.vocab_size == rows == made.lm_head.weight.shape[0]


def test_vocabulary_command(
    tiny_target_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = plan_folder(tiny_target_folder, tmp_path / "other")
    assert main(["vocabulary", str(tiny_target_folder), str(other)]) == 0
    shown = capsys.readouterr()
    assert shown.out.splitlines()[:1] == [""] or "identical" in shown.out
    assert "can draft for the other as it is" in shown.out
    assert "ids that agree" in shown.err
    file = other / "tokenizer.json"
    data = json.loads(file.read_text(encoding="utf-8"))
    ids = data["model"]["vocab"]
    ids["a"], ids["b"] = ids["b"], ids["a"]
    file.write_text(json.dumps(data), encoding="utf-8")
    assert main(["vocabulary", str(tiny_target_folder), str(other)]) == 1
    assert "2 ids mean different tokens" in capsys.readouterr().out
    assert main(["vocabulary", str(tiny_target_folder), str(tmp_path)]) == 2
    assert "no config.json" in capsys.readouterr().err


def test_measuring_is_the_search_of_tune(
    tiny_target_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked: list[tuple[TuneConfig, str, Path]] = []
    monkeypatch.setattr(tune, "tune", lambda *given: asked.append(given))
    out = tmp_path / "out"
    words = ["design", "--target", str(tiny_target_folder), "--params", "9k", "--measure", "cpu"]
    words += ["--output-dir", str(out)]
    assert main([*words, "--acceptance", "{1: 0.3, 2: 0.4}"]) == 0
    ((config, target, folder),) = asked
    assert (config.params, config.measure) == (9000, "cpu")
    assert config.acceptance == {"1": 0.3, "2": 0.4}
    assert (target, folder) == (str(tiny_target_folder), out)
    assert main([*words, "--acceptance", "{1: 0.3"]) == 2
    assert "acceptance: '{1: 0.3' is no YAML value" in capsys.readouterr().err
    assert not out.exists()
