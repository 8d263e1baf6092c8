"""`fastdraft push --to-folder`: what a push would send, as a folder that from_pretrained loads."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastdraft_hf._errors import FastDraftError
from fastdraft_hf._metadata import check_metadata
from fastdraft_hf.draft.reduced_vocabulary import (
    ReducedVocabulary,
    read_reduced_vocabulary,
    write_reduced_vocabulary,
)
from fastdraft_hf.hub.folder import cast_weights, write_folder
from fastdraft_hf.stages.publishing import prepare

Command = Callable[..., tuple[int, str]]
Write = Callable[..., str]


@pytest.fixture
def shelf(tmp_path: Path) -> Path:
    return tmp_path / "model_cards" / "Tiny-FastDraft"


@pytest.fixture
def write(run_folder: Path, shelf: Path, fastdraft: Command) -> Write:
    """Write the run's draft to the shelf; return what a refusal printed."""

    def call(*words: str, source: Path = run_folder, to: Path = shelf) -> str:
        status, said = fastdraft("push", source, "--to-folder", to, *words)
        return "" if status == 0 else said

    return call


def test_the_folder_is_what_a_push_would_send(
    run_folder: Path, shelf: Path, tiny_target_folder: Path, write: Write
) -> None:
    assert write("--dtype", "bfloat16", "--target", str(tiny_target_folder)) == ""
    assert [p.name for p in shelf.parent.iterdir()] == [shelf.name]
    files = prepare(run_folder, "model_cards/Tiny-FastDraft", shelf.parent / "unused")
    assert {p.relative_to(shelf).as_posix() for p in shelf.rglob("*") if p.is_file()} == set(files)

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
    check_metadata(card.data.to_dict())
    assert 'from_pretrained("model_cards/Tiny-FastDraft")' in card.text
    records = json.loads((shelf / "provenance.json").read_text(encoding="utf-8"))
    assert {"design", "align", "card", "push"} <= records.keys()
    facts = records["push"]["facts"]
    assert facts["dtype"] == "bfloat16"
    assert facts["cast_from"] == ["float32"]
    assert [d["name"] for d in facts["acceptance"]["drafts"]] == ["before", "after"]
    assert facts["note"] in card.text
    assert "stored in bfloat16" in facts["note"]


def test_what_was_written_can_be_pushed(shelf: Path, write: Write, tmp_path: Path) -> None:
    """The card then names the repository, the records go along, and weights stay as they are."""
    assert write("--dtype", "bfloat16") == ""
    files = prepare(shelf, "user/draft", tmp_path / "scratch")
    card = bytes(files["README.md"]).decode()
    assert 'from_pretrained("user/draft")' in card
    assert "model_cards/" not in card
    assert "was not measured" in card
    assert {"design", "align", "push"} <= json.loads(bytes(files["provenance.json"])).keys()
    again = tmp_path / "model_cards" / "again"
    assert write("--dtype", "bfloat16", source=shelf, to=again) == ""
    one, other = (load_file(folder / "model.safetensors") for folder in (shelf, again))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_sharded_weights_and_a_reduced_vocabulary(
    run_folder: Path, shelf: Path, write: Write
) -> None:
    draft = run_folder / "draft"
    write_reduced_vocabulary(draft, ReducedVocabulary((0, 1, 2, 5)))
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
    assert found.token_ids == (0, 1, 2, 5)


def test_a_folder_is_replaced_only_when_asked(run_folder: Path, shelf: Path, write: Write) -> None:
    assert write() == ""
    (shelf / "notes.txt").write_text("of the older draft", encoding="utf-8")
    first = (shelf / "provenance.json").read_bytes()
    assert "exists; replace it with --overwrite" in write("--dtype", "bfloat16")
    assert (shelf / "provenance.json").read_bytes() == first
    left = shelf.with_name(f".{shelf.name}.partial")  # of a killed run
    left.mkdir()
    (left / "model.bin").write_bytes(b"half")
    assert write("--overwrite", "--dtype", "bfloat16") == ""
    assert not (shelf / "notes.txt").exists()
    assert not (shelf / "model.bin").exists()
    assert [p.name for p in shelf.parent.iterdir()] == [shelf.name]


def test_a_full_disk_leaves_the_old_folder(
    run_folder: Path, shelf: Path, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert write() == ""
    before = {p: p.read_bytes() for p in shelf.rglob("*") if p.is_file()}

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    files = prepare(run_folder, "model_cards/Tiny-FastDraft", shelf.parent / "unused")
    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(OSError, match="No space"):
        write_folder(files, shelf)
    assert {p: p.read_bytes() for p in shelf.rglob("*") if p.is_file()} == before


def test_weights_that_are_not_finite_are_refused(run_folder: Path, tmp_path: Path) -> None:
    path = run_folder / "draft" / "model.safetensors"
    tensors = load_file(path)
    name = sorted(tensors)[0]
    tensors[name].view(-1)[0] = 1e6  # beyond float16
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(FastDraftError, match=f"{name} is not finite in float16"):
        cast_weights(run_folder / "draft", tmp_path, "float16")


def test_rounded_weights_are_measured_with_their_own_target(
    shelf: Path, tiny_target_folder: Path, tmp_path: Path, write: Write
) -> None:
    other = Path(shutil.copytree(tiny_target_folder, tmp_path / "other"))
    tokenizer = AutoTokenizer.from_pretrained(other)
    tokenizer.add_tokens(["<|more|>"])
    tokenizer.save_pretrained(other)
    said = write("--dtype", "bfloat16", "--target", str(other))
    assert "its vocabulary is not the target's" in said
    assert "--target: needs --dtype" in write("--target", str(other))
    assert not shelf.exists()
