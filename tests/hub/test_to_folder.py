"""`fastdraft push --to-folder`: what a push would send, as a folder that from_pretrained loads."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_server import gathered
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastdraft_hf.draft.reduced_vocabulary import (
    read_reduced_vocabulary,
    write_reduced_vocabulary,
)
from fastdraft_hf.hub import folder as hub_folder
from fastdraft_hf.hub.folder import files_below

Write = Callable[..., str]


@pytest.fixture
def shelf(tmp_path: Path) -> Path:
    return tmp_path / "model_cards" / "Tiny-FastDraft"


@pytest.fixture
def write(run_folder: Path, shelf: Path, fastdraft: Callable[..., tuple[int, str]]) -> Write:
    """Write the run's draft to the shelf; return what a refusal printed."""

    def call(*words: str, source: Path = run_folder, to: Path = shelf) -> str:
        status, said = fastdraft("push", source, "--to-folder", to, *words)
        return "" if status == 0 else said

    return call


def test_the_folder_is_what_a_push_would_send(
    run_folder: Path, shelf: Path, tiny_target_folder: Path, write: Write
) -> None:
    assert write("--dtype", "bfloat16") == ""
    assert [p.name for p in shelf.parent.iterdir()] == [shelf.name]
    assert files_below(shelf).keys() == files_below(gathered(run_folder)).keys()

    before = load_file(run_folder / "draft" / "model.safetensors")
    after = load_file(shelf / "model.safetensors")
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor.to(torch.bfloat16)), name
    model = AutoModelForCausalLM.from_pretrained(shelf)
    assert model.dtype == torch.bfloat16
    assert model.generation_config.num_assistant_tokens == 3
    own, given = (AutoTokenizer.from_pretrained(f) for f in (shelf, tiny_target_folder))
    assert own.get_vocab() == given.get_vocab()

    card = ModelCard.load(shelf / "README.md")
    assert 'from_pretrained("model_cards/Tiny-FastDraft")' in card.text
    records = json.loads((shelf / "provenance.json").read_text(encoding="utf-8"))
    assert {"design", "align", "card"} <= records.keys()
    assert "stored in bfloat16; the figures below were measured with float32" in card.text

    # What was written can be pushed: the card names the repository, the records go along.
    files = gathered(shelf)
    text = (files / "README.md").read_text(encoding="utf-8")
    assert 'from_pretrained("user/draft")' in text
    assert "model_cards/" not in text
    sent = json.loads((files / "provenance.json").read_text(encoding="utf-8"))
    assert sent.keys() == records.keys()
    assert load_file(files / "model.safetensors").keys() == after.keys()


def test_sharded_weights_and_a_reduced_vocabulary(
    run_folder: Path, shelf: Path, write: Write
) -> None:
    draft = run_folder / "draft"
    write_reduced_vocabulary(draft, [0, 1, 2, 5])
    model = AutoModelForCausalLM.from_pretrained(draft)
    (draft / "model.safetensors").unlink()
    model.save_pretrained(draft, max_shard_size="20KB")
    assert len(list(draft.glob("*.safetensors"))) > 1
    assert write("--dtype", "bfloat16") == ""
    loaded = AutoModelForCausalLM.from_pretrained(shelf)
    for name, parameter in model.named_parameters():
        assert torch.equal(loaded.get_parameter(name), parameter.to(torch.bfloat16))
    found = read_reduced_vocabulary(shelf)
    assert found is not None
    assert found == [0, 1, 2, 5]


def test_a_folder_is_replaced_only_when_asked_and_never_in_part(
    shelf: Path, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert write() == ""
    (shelf / "notes.txt").write_text("of the older draft", encoding="utf-8")
    before = {p: p.read_bytes() for p in shelf.rglob("*") if p.is_file()}
    assert "exists; replace it with --overwrite" in write("--dtype", "bfloat16")

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(hub_folder, "write_json", full)
        assert "no space left" in write("--overwrite")
    assert {p: p.read_bytes() for p in shelf.rglob("*") if p.is_file()} == before
    assert write("--overwrite", "--dtype", "bfloat16") == ""
    assert not (shelf / "notes.txt").exists()
    assert [p.name for p in shelf.parent.iterdir()] == [shelf.name]


def test_weights_that_are_not_finite_are_refused(run_folder: Path, write: Write) -> None:
    path = run_folder / "draft" / "model.safetensors"
    tensors = load_file(path)
    name = sorted(tensors)[0]
    tensors[name].view(-1)[0] = 1e6  # beyond float16
    save_file(tensors, path, metadata={"format": "pt"})
    assert f"{name} is not finite in float16" in write("--dtype", "float16")
