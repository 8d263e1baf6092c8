"""GGUF files are read back through transformers: weights, names, settings are the model's."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    LlamaForCausalLM,
    MistralConfig,
    Phi3Config,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

from fastdraft_hf import FastDraftError
from fastdraft_hf.export.gguf import check_supported, export_gguf, pre_tokenizer_name
from fastdraft_hf.export.parity import compare_export
from fastdraft_hf.target.embedded import build_tokenizer, read_fields

SIZES = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def fields(file: Path) -> dict[str, Any]:
    return {k: f.contents() for k, f in gguf.GGUFReader(str(file)).fields.items()}


@pytest.fixture
def save(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> Callable[[Any], Path]:
    def make(config: Any) -> Path:
        config.vocab_size = len(tiny_tokenizer) + 3  # a head that is padded beyond the tokenizer
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(6 if parameter.dim() > 1 else 1).add_(0.01)
        folder = tmp_path / config.model_type
        model.save_pretrained(folder)
        tiny_tokenizer.save_pretrained(folder)
        return folder

    return make


@pytest.mark.parametrize(
    "config",
    [
        MistralConfig(**SIZES, sliding_window=None, head_dim=24),
        Qwen2Config(**SIZES),
        Qwen3Config(**SIZES, head_dim=24, tie_word_embeddings=True),
        Phi3Config(**SIZES),
    ],
    ids=lambda config: config.model_type,
)
def test_a_family_comes_back_as_it_was(
    config: Any, save: Callable[[Any], Path], tmp_path: Path
) -> None:
    folder, file = save(config), tmp_path / "model.gguf"
    export_gguf(folder, file, "f32")
    found = compare_export(folder, file)
    assert found.max_logit_difference < 1e-4
    assert found.exact
    assert found.same_texts == found.texts


def test_the_settings_and_the_tokenizer_are_the_models(
    tiny_target_folder: Path, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    file = tmp_path / "model.gguf"
    export_gguf(tiny_target_folder, file, "f32")
    # Nothing is told to transformers here: the file alone must give the model.
    alone = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name, dtype=torch.float32)
    model = LlamaForCausalLM.from_pretrained(tiny_target_folder)
    ids = torch.arange(20, 60)[None]
    with torch.no_grad():
        torch.testing.assert_close(alone(ids).logits, model(ids).logits)
    assert alone.config.tie_word_embeddings
    own = build_tokenizer(read_fields(file))
    for text in ("def f(x): return 12", " Grüße, two  spaces\n", "<|im_end|>"):
        assert own(text)["input_ids"] == tiny_tokenizer(text)["input_ids"]
    assert (own.bos_token, own.eos_token) == (tiny_tokenizer.bos_token, tiny_tokenizer.eos_token)
    assert own.chat_template == tiny_tokenizer.chat_template
    found = fields(file)
    assert found["general.architecture"] == "llama"
    assert found["tokenizer.ggml.add_bos_token"] is False
    assert [p.name for p in tmp_path.iterdir()] == ["model.gguf"]


def test_rope_scaling_of_llama_3_is_written_as_factors(
    save: Callable[[Any], Path], tiny_config: Callable[..., Any], tmp_path: Path
) -> None:
    config = tiny_config(rope_parameters=dict(LLAMA3_ROPE), max_position_embeddings=256)
    folder, file = save(config), tmp_path / "model.gguf"
    export_gguf(folder, file, "f32")
    factors = next(
        t.data for t in gguf.GGUFReader(str(file)).tensors if t.name == "rope_freqs.weight"
    )
    model = AutoModelForCausalLM.from_pretrained(folder)
    plain = 10000.0 ** (-torch.arange(0, 8, 2) / 8)
    torch.testing.assert_close(
        plain / torch.tensor(factors), model.model.rotary_emb.inv_freq.float()
    )
    assert max(factors) == pytest.approx(8.0)
    assert compare_export(folder, file).exact


@pytest.mark.parametrize(("weight_type", "bound"), [("f16", 0.002), ("bf16", 0.02), ("q8_0", 0.06)])
def test_smaller_types_are_near_and_smaller(
    weight_type: Any, bound: float, tiny_target_folder: Path, tmp_path: Path
) -> None:
    full, small = tmp_path / "full.gguf", tmp_path / "small.gguf"
    export_gguf(tiny_target_folder, full, "f32")
    export_gguf(tiny_target_folder, small, weight_type)
    assert small.stat().st_size < full.stat().st_size
    found = compare_export(tiny_target_folder, small)
    assert 0 < found.max_logit_difference < bound * found.logit_size
    matrices = {t.name: t.tensor_type.name for t in gguf.GGUFReader(str(small)).tensors}
    assert matrices["blk.0.attn_q.weight"].lower() == weight_type
    assert matrices["blk.0.attn_norm.weight"] == "F32"


def test_rows_that_q8_0_cannot_hold_stay_f16(
    save: Callable[[Any], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sizes = {**SIZES, "hidden_size": 48, "num_attention_heads": 3, "num_key_value_heads": 1}
    export_gguf(save(Qwen3Config(**sizes, head_dim=16)), tmp_path / "x.gguf", "q8_0")
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "x.gguf").tensors}
    assert kinds["blk.0.ffn_down.weight"] == "Q8_0"  # 96 wide
    assert kinds["token_embd.weight"] == kinds["blk.1.attn_q.weight"] == "F16"
    assert "14 matrices are stored in f16, not q8_0" in caplog.text


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (SmolLM3Config(num_hidden_layers=4), "family 'smollm3' is not mapped; use llama.cpp's own"),
        (Qwen2Config(**{**SIZES, "head_dim": 24}), "4 x 24 is not 64"),
        (
            Phi3Config(
                **SIZES,
                original_max_position_embeddings=64,
                rope_parameters={
                    "rope_type": "longrope",
                    "rope_theta": 1e4,
                    "short_factor": [1.0] * 8,
                    "long_factor": [1.0] * 8,
                },
            ),
            "rope scaling 'longrope' is not mapped",
        ),
    ],
)
def test_what_is_not_mapped_is_refused(config: Any, said: str) -> None:
    with pytest.raises(FastDraftError, match=said):
        check_supported(config)


LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PLAIN = pre_tokenizers.ByteLevel(add_prefix_space=False)


def digits(individual: bool) -> Any:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=individual), PLAIN])


def after(numbers: str) -> Any:
    split = pre_tokenizers.Split(Regex(LETTERS + numbers + REST), "isolated")
    raw = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([split, raw])


@pytest.mark.parametrize(
    ("split", "name"),
    [
        (PLAIN, "gpt-2"),
        (digits(True), "smollm"),
        (after(r"\p{N}{1,3}"), "llama-bpe"),
        (after(r"\p{N}"), "qwen2"),
        (None, None),
        (pre_tokenizers.Metaspace(), None),
        (pre_tokenizers.ByteLevel(add_prefix_space=True), None),
        (after(r"\p{N}{1,2}"), None),
        (digits(False), None),
    ],
)
def test_pre_tokenizers_by_the_names_of_llama_cpp(split: Any, name: str | None) -> None:
    backend = Tokenizer(models.BPE(vocab={"a": 0}, merges=[]))
    if split is not None:
        backend.pre_tokenizer = split
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    if name is not None:
        assert pre_tokenizer_name(tokenizer) == name
        return
    with pytest.raises(FastDraftError, match="not a byte-level BPE that is mapped"):
        pre_tokenizer_name(tokenizer)


def test_nothing_is_left_of_an_export_that_fails(tiny_target_folder: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(tiny_target_folder, tmp_path / "broken"))
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "mlp_bias": True}))
    out = tmp_path / "out"
    with pytest.raises(FastDraftError, match="mlp_bias is not mapped"):
        export_gguf(broken, out / "x.gguf")
    assert not out.exists()
