"""The real embedded target: its conversion is silent when it is wrong, so facts are checked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from fastdraft_hf._errors import FastDraftError
from fastdraft_hf.target.embedded import check_tokenizer, embedded_target


def test_the_saved_tokenizer_passes_its_check(
    target_tokenizer: PreTrainedTokenizerBase, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    check_tokenizer(target_tokenizer)
    with pytest.raises(FastDraftError, match="converted tokenizer is wrong: length 288"):
        check_tokenizer(tiny_tokenizer)


# Without control characters: the model's own vocabulary has no token for some of those bytes.
@given(st.text(alphabet=st.characters(codec="ascii", exclude_categories=["Cc"]) | st.just("\n")))
def test_text_comes_back(target_tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    ids = target_tokenizer(text, add_special_tokens=False)["input_ids"]
    assert target_tokenizer.decode(ids) == text


@pytest.mark.parametrize("text", ["naïve café, Straße", "日本語のテキスト", "so 🙂 done", "x² ≤ π"])
def test_other_writing_comes_back(target_tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    assert target_tokenizer.decode(target_tokenizer(text)["input_ids"]) == text


def test_the_embedded_target_is_the_model_and_its_folder_names_the_source(
    target_folder: Path, target_tokenizer: PreTrainedTokenizerBase
) -> None:
    model = AutoModelForCausalLM.from_pretrained(target_folder, dtype=torch.float32)
    inputs = target_tokenizer("The capital of France is", return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=2, do_sample=False)
    new = output[0, inputs["input_ids"].shape[1] :]
    assert target_tokenizer.decode(new) == " Paris."
    assert (model.generation_config.eos_token_id, model.config.vocab_size) == (2, 49152)
    facts = json.loads((target_folder / "fastdraft_source.json").read_text(encoding="utf-8"))
    assert (facts["license"], len(facts["sha256"])) == ("apache-2.0", 64)
    assert facts["sha256"][:8] in target_folder.name
    assert embedded_target() == target_folder
