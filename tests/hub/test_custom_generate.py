import builtins
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from fastdraft_hf.decode import speculative
from fastdraft_hf.hub.folder import write_custom_generate

TinyModel = Callable[..., LlamaForCausalLM]
IDS = torch.tensor([[40, 41, 42]])


@pytest.fixture
def folder(tmp_path: Path, tiny_model: TinyModel) -> Path:
    tiny_model(seed=1).save_pretrained(tmp_path / "draft")
    write_custom_generate(tmp_path / "draft")
    return tmp_path / "draft"


def generate(target: Any, **given: Any) -> Any:
    mask = torch.ones_like(IDS)
    fields = {"inputs": IDS, "attention_mask": mask, "do_sample": False, "max_new_tokens": 8}
    return target.generate(**fields, **given)


def test_the_folder_leads_to_our_loop(
    folder: Path, tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tiny_model(seed=0)
    draft = AutoModelForCausalLM.from_pretrained(folder)
    calls: list[int] = []
    decode = speculative._decode
    monkeypatch.setattr(speculative, "_decode", lambda *a, **k: calls.append(1) or decode(*a, **k))
    given = {"custom_generate": str(folder), "trust_remote_code": True}
    output = generate(target, assistant_model=draft, **given)
    assert calls == [1]
    assert torch.equal(output, generate(target))
    assert torch.equal(generate(target, **given), generate(target))
    # Loaded with its code, it is still an ordinary model.
    loaded = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert torch.equal(generate(loaded), generate(draft))


def test_without_the_package_it_is_stock(
    folder: Path, tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, draft = tiny_model(seed=0), AutoModelForCausalLM.from_pretrained(folder)
    ordinary = builtins.__import__

    def missing(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "fastdraft_hf":
            raise ImportError(name)
        return ordinary(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        output = generate(
            target, assistant_model=draft, custom_generate=str(folder), trust_remote_code=True
        )
    assert any("fastdraft_hf is not installed" in str(w.message) for w in caught)
    assert torch.equal(output, generate(target))
