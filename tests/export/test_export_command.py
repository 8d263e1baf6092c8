"""`fastdraft export openvino|gguf MODEL`: what is made, what is said about it, what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from fastdraft_hf import FastDraftError
from fastdraft_hf.cli import main as cli
from fastdraft_hf.export import parity
from fastdraft_hf.export.config import ExportConfig
from fastdraft_hf.export.parity import Parity, Parting, checked_export, compare
from fastdraft_hf.stages.export import PROMPTS


@pytest.fixture
def draft(tiny_target_folder: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "draft"
    shutil.copytree(tiny_target_folder, folder)
    return folder


def test_a_draft_goes_to_openvino_and_says_what_it_lost(
    draft: Path,
    tiny_target_folder: Path,
    openvino_models: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With a model that other tests use too: starting the exporter takes ten seconds."""

    def copy(model: Path, output: Path, weight_format: str) -> None:
        assert (model, weight_format) == (draft, "int8")
        shutil.copytree(openvino_models.target_int8, output)

    monkeypatch.setattr(parity, "export_openvino", copy)
    words = ["export", "openvino", "--weight-format", "int8", str(draft)]
    assert cli.main([*words, "--target", str(tiny_target_folder)]) == 0
    said = capsys.readouterr().out.splitlines()
    folder = tmp_path / "draft-openvino-int8"
    assert said[0].startswith(f"{folder}: ")
    assert "logits: largest difference" in said[1]
    reading = next(i for i, line in enumerate(said) if line.startswith("expected acceptance rate"))
    assert said[reading].startswith("expected acceptance rate (γ = 3, T = 0.6, 8 texts")
    # A draft that is its target is always accepted (end tokens apart), and int8 nearly so.
    rates = [float(line.split()[-7].rstrip(",")) for line in said[reading + 1 : reading + 3]]
    assert rates[0] > 0.97
    assert 0.5 < rates[1] <= rates[0] + 0.01
    for file in ("openvino_model.bin", "openvino_tokenizer.xml", "openvino_detokenizer.xml"):
        assert (folder / file).exists()
    assert {p.name for p in tmp_path.iterdir()} == {"draft", "draft-openvino-int8"}
    assert cli.main([*words]) == 2
    assert f"{folder} exists" in capsys.readouterr().err


def test_a_target_is_exported_beside_the_draft(
    draft: Path,
    tiny_target_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = []

    def fake(model: Path, output: Path, form: str, *, check: bool) -> None:
        made.append((model.name, output.name, form, check))
        output.mkdir(parents=True)

    monkeypatch.setattr(parity, "checked_export", fake)
    monkeypatch.setattr("fastdraft_hf.cli.export._acceptance", lambda *given: None)
    monkeypatch.setattr("fastdraft_hf.export.openvino.openvino_available", lambda: True)
    words = ["export", "openvino", str(draft), "--no-check", "--target", str(tiny_target_folder)]
    words += ["--target-weight-format", "int4", "--output", str(tmp_path / "out" / "d")]
    assert cli.main(words) == 0
    assert made == [
        ("draft", "d", "int8", False),
        ("target", "target-openvino-int4", "int4", False),
    ]
    assert "not compared with PyTorch" in capsys.readouterr().out


def test_a_draft_goes_to_gguf(
    draft: Path, tiny_target_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["export", "gguf", str(draft), "--weight-format", "f32"]
    assert cli.main([*words, "--target", str(tiny_target_folder)]) == 0
    said = capsys.readouterr().out
    assert "greedy text: 4 of 4 the same" in said
    assert "GGUF f32" in said
    assert (tmp_path / "draft-f32.gguf").stat().st_size > 0
    assert {p.name for p in tmp_path.iterdir()} == {"draft", "draft-f32.gguf"}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["gguf", "a", "--weight-format", "int8"], "'int8' is not one of f32, f16, bf16, q8_0"),
        (["openvino", "a", "--weight-format", "int5"], "'int5' is not one of fp32, fp16, int8"),
        (["gguf", "a", "--target-weight-format", "f16"], "needs export openvino and --target"),
        (["gguf", "a", "--output", "b"], "--output: must end in .gguf, got b"),
        (["gguf", "./nowhere"], "export: the folder nowhere does not exist"),
    ],
)
def test_bad_arguments_are_one_line(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["export", *words]) == 2
    error = capsys.readouterr().err.strip()
    assert said in error
    assert len(error.splitlines()) == 1


def test_a_dry_run_says_what_would_be_made(
    draft: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["export", "gguf", str(draft), "--dry-run"]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "draft-f16.gguf")
    assert not (tmp_path / "draft-f16.gguf").exists()


def test_fp32_that_disagrees_is_not_handed_over(
    tmp_path: Path, draft: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    apart = Parity(10, 0.5, 10.0, 0.9, 4, (Parting(2, 3, 1.5, False),))
    monkeypatch.setattr(parity, "compare_export", lambda *given: apart)
    monkeypatch.setattr(parity, "export_openvino", lambda model, out, form: out.mkdir())
    output = tmp_path / "ir"
    with pytest.raises(FastDraftError, match=r"\.unchecked-ir differs from PyTorch"):
        checked_export(draft, output, "fp32")
    assert not output.exists()
    assert (tmp_path / ".unchecked-ir").exists()  # kept, under another name
    assert checked_export(draft, output, "int8") == apart  # reported, not refused
    assert output.is_dir()
    assert not (tmp_path / ".unchecked-ir").exists()


class TestComparing:
    prompts = ((40, 41, 42), (60, 61))

    def compared(self, first: Any, second: Any) -> Parity:
        return compare(first, second, [list(p) for p in self.prompts], new_tokens=12)

    def test_a_model_is_itself(self, tiny_model: Any) -> None:
        found = self.compared(tiny_model(), tiny_model())
        assert found.exact
        assert found.max_logit_difference == 0
        assert (found.texts, found.partings, found.same_best) == (2, (), 1.0)

    def test_another_model_is_found_out(self, tiny_model: Any) -> None:
        found = self.compared(tiny_model(), tiny_model(seed=1))
        assert not found.exact
        assert found.same_best < 0.9
        assert any(not parting.tie for parting in found.partings)
        assert "PyTorch's margin there" in "\n".join(found.lines())

    def test_rounding_differs_at_a_tie_if_at_all(self, tiny_model: Any) -> None:
        second = tiny_model()
        with torch.no_grad():
            for parameter in second.parameters():
                parameter.mul_(1 + 1e-6)
        found = self.compared(tiny_model(), second)
        assert 0 < found.max_logit_difference < 1e-2
        assert found.exact

    def test_a_text_that_ends_early_differs_from_its_end(self, tiny_model: Any) -> None:
        prompt, other = list(self.prompts[0]), tiny_model()
        fourth = tiny_model().generate(torch.tensor([prompt]), max_new_tokens=4, do_sample=False)
        other.generation_config.eos_token_id = int(fourth[0, -1])
        found = compare(tiny_model(), other, [prompt])
        assert [p.tie for p in found.partings] == [False]
        assert found.partings[0].place <= 4
        assert not found.exact


def test_texts_of_acceptance_are_bounded() -> None:
    assert ExportConfig(acceptance_texts=0).acceptance_texts == 0
    with pytest.raises(FastDraftError, match="acceptance_texts: must be from 0 to 8, got 9"):
        ExportConfig(acceptance_texts=9)
    assert len(PROMPTS) == 8
