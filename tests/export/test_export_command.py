"""`fastdraft export openvino|gguf MODEL`: what is made, what is said about it, what is refused."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from fastdraft_hf import FastDraftError
from fastdraft_hf.cli import main as cli
from fastdraft_hf.export import parity
from fastdraft_hf.export.parity import Parity, checked_export, compare
from fastdraft_hf.recipe import ExportConfig
from fastdraft_hf.stages.export import PROMPTS


@pytest.fixture
def draft(tiny_target_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_target_folder, tmp_path / "draft"))


def test_a_draft_goes_to_openvino_and_says_what_it_lost(
    draft: Path,
    tiny_target_folder: Path,
    openvino_models: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With a model that other tests use too: starting the exporter takes ten seconds."""

    def copy(job: tuple[Path, Path, str]) -> None:
        model, output, weight_format = job
        assert (model, weight_format) == (draft, "int8")
        shutil.copytree(openvino_models.target_int8, output)

    monkeypatch.setattr(parity, "export_openvino", copy)
    words = ["export", "openvino", "--weight-format", "int8", str(draft)]
    assert cli.main([*words, "--target", str(tiny_target_folder)]) == 0
    said = capsys.readouterr().out.splitlines()
    folder = tmp_path / "draft-openvino-int8"
    assert said[0].startswith(f"{folder}: ")
    assert "logits: largest difference" in said[1]
    assert said[3].startswith("expected acceptance rate (γ = 3, T = 0.6, 8 texts")
    # A draft that is its target is always accepted (end tokens apart), and int8 nearly so.
    rates = [float(line.split()[-7].rstrip(",")) for line in said[4:6]]
    assert rates[0] > 0.97
    assert 0.5 < rates[1] <= rates[0] + 0.01
    for file in ("openvino_model.bin", "openvino_tokenizer.xml", "openvino_detokenizer.xml"):
        assert (folder / file).exists()
    assert {p.name for p in tmp_path.iterdir()} == {"draft", "draft-openvino-int8"}
    assert cli.main([*words]) == 2
    assert f"{folder} exists" in capsys.readouterr().err


def test_a_draft_goes_to_gguf(
    draft: Path, tiny_target_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["export", "gguf", str(draft), "--weight-format", "f32"]
    assert cli.main([*words, "--target", str(tiny_target_folder)]) == 0
    said = capsys.readouterr().out
    assert "greedy text: 4 of 4 the same" in said
    assert "GGUF f32" in said
    assert (tmp_path / "draft-f32.gguf").stat().st_size > 0
    assert cli.main(["export", "gguf", str(draft), "--no-check"]) == 0
    assert "not compared with PyTorch" in capsys.readouterr().out
    assert {p.name for p in tmp_path.iterdir()} == {"draft", "draft-f16.gguf", "draft-f32.gguf"}


def test_bad_arguments_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for words, said in (
        (["gguf", "a", "--output", "b"], "--output: must end in .gguf, got b"),
        (["gguf", "./nowhere"], "export: the folder nowhere does not exist"),
    ):
        assert cli.main(["export", *words]) == 2
        assert said in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["export", "gguf", "a", "--weight-format", "int8"])
    assert "--weight-format: invalid choice: 'int8' (choose from" in capsys.readouterr().err
    with pytest.raises(FastDraftError, match="acceptance_texts: must be at most 8, got 9"):
        ExportConfig(acceptance_texts=9)
    assert len(PROMPTS) == 8


def test_fp32_that_disagrees_is_not_handed_over(
    tmp_path: Path, draft: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    apart = Parity(10, 0.5, 10.0, 0.9, texts=4, same_texts=3, ties=0)
    monkeypatch.setattr(parity, "compare_export", lambda *given: apart)
    monkeypatch.setattr(parity, "export_openvino", lambda job: job[1].mkdir())
    output = tmp_path / "ir"
    with pytest.raises(FastDraftError, match=r"\.unchecked-ir differs from PyTorch"):
        checked_export(draft, output, "fp32")
    assert not output.exists()
    assert (tmp_path / ".unchecked-ir").exists()  # kept, under another name
    assert checked_export(draft, output, "int8") == apart  # reported, not refused
    assert output.is_dir()
    assert not (tmp_path / ".unchecked-ir").exists()


def test_two_models_are_compared(tiny_model: Any) -> None:
    prompts = [[40, 41, 42], [60, 61]]

    def compared(other: Any) -> Parity:
        return compare(tiny_model(), other, prompts, new_tokens=12)

    found = compared(tiny_model())
    assert found.exact
    assert found.max_logit_difference == 0
    assert (found.texts, found.same_texts, found.same_best) == (2, 2, 1.0)
    found = compared(tiny_model(seed=1))
    assert not found.exact
    assert found.same_best < 0.9
    assert found.same_texts + found.ties < 2
    rounded = tiny_model()  # differs at a tie, if at all
    with torch.no_grad():
        for parameter in rounded.parameters():
            parameter.mul_(1 + 1e-6)
    found = compared(rounded)
    assert 0 < found.max_logit_difference < 1e-2
    assert found.exact
    shorter = tiny_model()  # a text that ends early is another text
    fourth = tiny_model().generate(torch.tensor(prompts[:1]), max_new_tokens=4, do_sample=False)
    shorter.generation_config.eos_token_id = int(fourth[0, -1])
    found = compared(shorter)
    assert (found.max_logit_difference, found.ties) == (0, 0)
    assert not found.exact
