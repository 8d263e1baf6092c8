"""Target folders that are damaged or not what they say: one line before any work."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from fastdraft_hf._errors import FastDraftError
from fastdraft_hf.cli.main import main
from fastdraft_hf.data.prompts import chat_ids
from fastdraft_hf.export.openvino import cached_openvino
from fastdraft_hf.target import resolve

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
HEAD = "lm_head.weight"
ESCAPES = "{{ cycler.__init__.__globals__.os.system('touch escaped') }}"
COUNTS = "{% for i in range(10**12) %}{{ i }}{% endfor %}"
LOOPS = "{% for i in range(9**5) %}{% for j in range(9**5) %}{% endfor %}{% endfor %}"


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def rewrite(file: Path) -> None:
        found = load_file(file)
        change(found)
        save_file(found, file, metadata={"format": "pt"})

    return rewrite


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def sharded(names: Any) -> Callable[[Path], None]:
    """Replace the weights by an index that names other files."""

    def write(file: Path) -> None:
        (file.parent / WEIGHTS).unlink()
        file.write_text(json.dumps({"metadata": {}, "weight_map": names}))

    return write


# What is done to a file (JSON keys, new content, a function; None deletes it), and the error.
KINDS: dict[str, tuple[str, Any, str]] = {
    "config missing": (CONFIG, None, "holds no config.json"),
    "config empty": (CONFIG, "", "config.json is damaged: not valid"),
    "config cut": (CONFIG, cut, "config.json is damaged: not valid"),
    "config a list": (CONFIG, "[]", "config.json"),
    "config UTF-16": (CONFIG, "{}".encode("utf-16"), "config.json"),
    "config nested deeply": (CONFIG, "[" * 200_000, "config.json"),
    "no model type": (CONFIG, '{"a": 1}', "no config can be read"),
    "unknown model type": (CONFIG, {"model_type": "llamma"}, "llamma"),
    "model type a number": (CONFIG, {"model_type": 7}, "config"),
    "a vision model": (CONFIG, {"model_type": "vit"}, "ViTConfig"),
    "an encoder and decoder": (CONFIG, {"model_type": "t5"}, "T5Config"),
    "a million layers": (CONFIG, {"num_hidden_layers": 10**6}, "num_hidden_layers is 1,000,000"),
    "negative width": (CONFIG, {"hidden_size": -32}, "hidden_size is -32"),
    "absurd vocabulary": (CONFIG, {"vocab_size": 10**12}, "vocab_size is 1,000,000,000,000"),
    "no heads": (CONFIG, {"num_attention_heads": 0}, "no config can be read"),
    "heads in words": (CONFIG, {"num_attention_heads": "four"}, "config"),
    "another width": (CONFIG, {"hidden_size": 48}, "have another shape of"),
    "more layers": (CONFIG, {"num_hidden_layers": 3}, "the weights lack 9 tensors"),
    "unknown activation": (CONFIG, {"hidden_act": "gulp"}, "gulp"),
    "unknown type": (CONFIG, {"dtype": "float7"}, "float7"),
    "generation config": ("generation_config.json", "{", "generation_config.json"),
    "EOS in words": ("generation_config.json", {"eos_token_id": "end"}, "generation_config.json"),
    "tokenizer missing": ("tokenizer.json", None, "no tokenizer can be read"),
    "tokenizer empty": ("tokenizer.json", "", "no tokenizer can be read"),
    "tokenizer cut": ("tokenizer.json", cut, "no tokenizer can be read"),
    "tokenizer a list": ("tokenizer.json", "[]", "no tokenizer can be read"),
    "tokenizer of a new kind": ("tokenizer.json", {"model": {"type": "X"}}, "no tokenizer can be"),
    "tokenizer's config": ("tokenizer_config.json", "{", "no tokenizer can be read"),
    "template not text": ("chat_template.jinja", b"\xff\xfe{", "target"),
    "template endless": ("chat_template.jinja", LOOPS, "the chat template in"),
    "template of gigabytes": ("chat_template.jinja", "{{ 'a' * 10**10 }}", "the chat template in"),
    "template of megabytes": ("chat_template.jinja", "{{ 'a' * 10**7 }}", "the chat template in"),
    "template counts": ("chat_template.jinja", COUNTS, "the chat template in"),
    "weights missing": (WEIGHTS, None, "holds no .safetensors weights"),
    "weights pickled": (WEIGHTS, lambda file: file.rename(file.with_name("x.bin")), "pickled"),
    "weights empty": (WEIGHTS, "", "model.safetensors cannot be read"),
    "weights cut": (WEIGHTS, cut, "model.safetensors cannot be read"),
    "a pointer of git-lfs": (WEIGHTS, "version https://git-lfs", "model.safetensors cannot be"),
    "header damaged": (WEIGHTS, b"\x10" + bytes(7) + b"{]" * 8, "model.safetensors cannot be read"),
    "header endless": (WEIGHTS, b"\xff" * 64, "model.safetensors cannot be read"),
    "shards absent": (INDEX, sharded({HEAD: "model-1.safetensors"}), "model-1.safetensors cannot"),
    "index a list": (INDEX, sharded([1]), "cannot be read"),
    "a tensor missing": (WEIGHTS, tensors(lambda t: t.pop("model.norm.weight")), "model.norm.weig"),
    "all NaN": (WEIGHTS, tensors(lambda t: [v.fill_(torch.nan) for v in t.values()]), "is NaN"),
    "wrong shape": (
        WEIGHTS,
        tensors(lambda t: t.update({"model.norm.weight": torch.ones(7)})),
        "have another shape of 1 tensors of its config (model.norm.weight)",
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_broken_target_is_one_line(
    kind: str,
    tiny_target_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(resolve, "_TEMPLATE_SECONDS", 1)
    name, change, expected = KINDS[kind]
    target = tmp_path / "target"
    shutil.copytree(tiny_target_folder, target)
    file = target / name
    if change is None:
        file.unlink()
    elif callable(change):
        change(file)
    elif isinstance(change, dict):
        file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    else:
        file.write_bytes(change if isinstance(change, bytes) else change.encode())
    words = ["--dry-run", "--stages=design", f"target={target}", f"output_dir={tmp_path / 'run'}"]
    assert main(["run", *words]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("fastdraft: ")
    assert str(target) in line
    assert expected in line


def test_a_template_does_not_leave_its_sandbox(
    tiny_target_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    target = shutil.copytree(tiny_target_folder, tmp_path / "target")
    (target / "chat_template.jinja").write_text(ESCAPES)
    with pytest.raises(FastDraftError):
        chat_ids(resolve.load_tokenizer(target, "target"), "Hello")
    assert not (tmp_path / "escaped").exists()


def test_a_tied_head_is_not_missing(
    tiny_model: Callable[..., LlamaForCausalLM],
    tiny_tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for tie in (True, False):
        folder = tmp_path / f"tied_{tie}"
        tiny_model(tie_word_embeddings=tie).save_pretrained(folder)
        tiny_tokenizer.save_pretrained(folder)
        tensors(lambda found: found.pop(HEAD, None))(folder / WEIGHTS)
        words = [f"target={folder}", f"output_dir={tmp_path / 'run'}", "--dry-run"]
        assert main(["run", "--stages=design", *words]) == (0 if tie else 2)
    assert f"the weights lack 1 tensors of its config ({HEAD})" in capsys.readouterr().err


@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
def test_no_bad_weight_is_exported_for_openvino(
    value: float, tiny_target_folder: Path, tmp_path: Path
) -> None:
    """OpenVINO would answer with token 0, and not say why."""
    target = shutil.copytree(tiny_target_folder, tmp_path / "target")
    tensors(lambda found: found["model.layers.1.mlp.up_proj.weight"][7, 3].fill_(value))(
        target / WEIGHTS
    )
    resolve.check_model(target, "target")  # looks at the first rows only
    with pytest.raises(FastDraftError, match=r"safetensors .*up_proj\.weight holds NaN or inf"):
        cached_openvino(target, "int8")
