import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import GEMMAS
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from fastdraft_hf import FastDraftError
from fastdraft_hf.export import openvino
from fastdraft_hf.export.openvino import (
    cached_openvino,
    export_openvino,
    openvino_available,
    openvino_obstacle,
    require_openvino,
)
from fastdraft_hf.export.parity import EXACT, compare, compare_export


def test_an_exported_folder_is_complete_and_the_models_own(
    openvino_models: Any, tiny_target_folder: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    exported = openvino_models.target
    for name in ("openvino_model", "openvino_tokenizer", "openvino_detokenizer"):
        assert (exported / f"{name}.xml").stat().st_size > 0
        assert (exported / f"{name}.bin").exists()
    tokenizer = AutoTokenizer.from_pretrained(exported)
    assert tokenizer.get_vocab() == tiny_tokenizer.get_vocab()
    found = compare_export(tiny_target_folder, exported)
    assert found.exact
    assert found.same_best == 1.0


def test_a_failing_export_leaves_nothing_and_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real exporter fails in `tests/draft/test_reduced_vocabulary.py`."""
    pytest.importorskip("openvino_genai")
    python = tmp_path / "python"
    lines = ["#!/bin/sh", "cat > /dev/null", f"mkdir -p {tmp_path / 'won'}", "echo long ago >&2"]
    lines += [f"echo line {n} >&2" for n in range(4)] + ["echo KeyError: none >&2", "exit 1"]
    python.write_text("\n".join(lines) + "\n", encoding="utf-8")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    (tmp_path / "out").mkdir()
    # Of two processes that export at once the loser's rename fails; the winner's folder is used.
    export_openvino((tmp_path / "model", tmp_path / "won", "int8"))
    with pytest.raises(FastDraftError) as caught:
        export_openvino((tmp_path / "broken", tmp_path / "out" / "ir", "fp32"))
    head, _, reason = str(caught.value).partition("\n")
    assert head == f"OpenVINO export of {tmp_path / 'broken'} failed:"
    assert reason == "line 0\nline 1\nline 2\nline 3\nKeyError: none"
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("family", GEMMAS)
def test_gemma_goes_to_openvino_with_the_transformers_of_today(
    openvino_models: Any, family: str
) -> None:
    """optimum-intel refuses it, and need not: also beyond the sliding window nothing differs."""
    from optimum.intel import OVModelForCausalLM

    folder, export = openvino_models.sources / family, getattr(openvino_models, family)
    assert openvino_obstacle(folder) is None
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    exported = OVModelForCausalLM.from_pretrained(export, ov_config=EXACT)
    assert compare(model, exported, [[2, 5, 7], list(range(2, 22))]).exact


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("llama", None),
        ("olmo3", "cannot export family 'olmo3' to OpenVINO"),
        ("llama4_text", "cannot export family 'llama4_text' with transformers .*, only up to 4"),
    ],
)
def test_a_family_that_the_exporter_refuses_is_known_before_any_work(
    tmp_path: Path, family: str, reason: str | None
) -> None:
    pytest.importorskip("openvino_genai")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family}), encoding="utf-8")
    found = openvino_obstacle(tmp_path)
    assert found is None if reason is None else re.search(reason, found or "")


def test_without_openvino_the_message_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openvino.importlib.util, "find_spec", lambda name: None)
    assert not openvino_available()
    with pytest.raises(FastDraftError, match=r"pip install fastdraft_hf\[openvino\]"):
        require_openvino()
    with pytest.raises(FastDraftError, match=r"pip install"):
        export_openvino((tmp_path, tmp_path / "ir", "int8"))
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A target's folder; the cache is empty."""
    monkeypatch.setenv("FASTDRAFT_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "target"
    folder.mkdir()
    (folder / "config.json").write_text("{}", encoding="utf-8")
    save_file({"norm.weight": torch.zeros(9)}, folder / "model.safetensors")
    return folder


def test_a_target_is_exported_once_per_machine(
    target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its weights, its configuration and the format decide."""
    exports = []

    def export(job: tuple[Path, Path, str]) -> None:
        _, output, weight_format = job
        output.mkdir(parents=True)
        exports.append((output, weight_format))

    monkeypatch.setattr(openvino, "export_openvino", export)
    first = cached_openvino(target, "int8")
    (target / "README.md").write_text("a note", encoding="utf-8")
    assert cached_openvino(target, "int8") == first
    assert exports == [(first, "int8")]
    folders = [first, cached_openvino(target, "fp16")]
    save_file({"norm.weight": torch.ones(9)}, target / "model.safetensors")
    folders.append(cached_openvino(target, "int8"))
    (target / "config.json").write_text('{"a": 1}', encoding="utf-8")
    folders.append(cached_openvino(target, "int8"))
    assert len(set(folders)) == len(exports) == 4


@pytest.mark.parametrize(
    ("config", "size"),
    [
        ({"hidden_size": 256, "num_attention_heads": 4, "intermediate_size": 512}, None),
        ({"hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 1536}, 64),
        ({"hidden_size": 192, "num_attention_heads": 2, "head_dim": 16}, 32),
        ({"hidden_size": 40, "num_attention_heads": 4, "intermediate_size": 64}, -1),
        ({"d_model": 512}, None),
    ],
)
def test_int4_shares_scales_over_as_many_weights_as_the_widths_allow(
    config: dict[str, int], size: int | None, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert openvino._group_size(tmp_path) == size


@pytest.mark.slow
def test_a_narrow_draft_goes_to_int4(tmp_path: Path, tiny_model: Callable[..., Any]) -> None:
    """192 wide: NNCF refuses it with its own group size."""
    pytest.importorskip("openvino_genai")
    model = tmp_path / "model"
    tiny_model(hidden_size=192, intermediate_size=192, head_dim=48).save_pretrained(model)
    export_openvino((model, tmp_path / "ir", "int4"))
    assert (tmp_path / "ir" / "openvino_model.bin").stat().st_size > 0
