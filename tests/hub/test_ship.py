"""`fastdraft ship`: what push would send, in bfloat16, as a folder that from_pretrained loads."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from fastdraft_hf._errors import FastDraftError
from fastdraft_hf.decode.settings import store_draft_settings
from fastdraft_hf.draft.reduced_vocabulary import (
    ReducedVocabulary,
    read_reduced_vocabulary,
    write_reduced_vocabulary,
)
from fastdraft_hf.hub.folder import write_files
from fastdraft_hf.hub.metadata import check_metadata
from fastdraft_hf.hub.push import plan_push
from fastdraft_hf.stages.shipping import ship

Command = Callable[..., tuple[int, str]]


@pytest.fixture
def shelf(tmp_path: Path) -> Path:
    return tmp_path / "model_cards" / "Tiny-FastDraft"


def test_the_folder_is_what_a_push_would_send(
    run_folder: Path, shelf: Path, tiny_target_folder: Path, fastdraft: Command
) -> None:
    recipe = {"target": str(tiny_target_folder), "card": {"license": "apache-2.0"}}
    (run_folder / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    status, said = fastdraft("ship", run_folder, "--to", shelf)
    assert status == 0, said
    assert "the target's own on 4 of 4 prompts" in said
    assert [p.name for p in shelf.parent.iterdir()] == [shelf.name]
    (plan,) = plan_push(run_folder, "model_cards/Tiny-FastDraft")
    names = {p.relative_to(shelf).as_posix() for p in shelf.rglob("*") if p.is_file()}
    assert names == {file.path for file in plan.files}

    before = load_file(run_folder / "draft" / "model.safetensors")
    after = load_file(shelf / "model.safetensors")
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        assert after[name].dtype == torch.bfloat16
        assert torch.equal(after[name], tensor.to(torch.bfloat16)), name
    model = AutoModelForCausalLM.from_pretrained(shelf)
    assert model.dtype == torch.bfloat16
    assert model.generation_config.num_assistant_tokens == 3
    own, given = (AutoTokenizer.from_pretrained(f) for f in (shelf, tiny_target_folder))
    assert own.get_vocab() == given.get_vocab()

    card = ModelCard.load(shelf / "README.md")
    check_metadata(card.data.to_dict())
    assert 'from_pretrained("model_cards/Tiny-FastDraft")' in card.text
    assert str(run_folder) not in card.text
    records = json.loads((shelf / "provenance.json").read_text(encoding="utf-8"))
    assert {"design", "align", "card", "ship"} <= records.keys()
    facts = records["ship"]["facts"]
    assert facts["dtype"] == "bfloat16"
    assert facts["cast_from"] == ["float32"]
    assert facts["greedy_identical"] == facts["greedy_texts"] == 4
    assert [d["name"] for d in facts["acceptance"]["drafts"]] == ["before", "bfloat16"]
    assert facts["note"] in card.text
    assert "stored in bfloat16" in facts["note"]


def test_what_was_shipped_can_be_pushed(run_folder: Path, shelf: Path) -> None:
    """The card then names the repository, and the records of all stages go along."""
    ship(run_folder, shelf, check=False)
    (plan,) = plan_push(shelf, "user/draft")
    files = {file.path: file for file in plan.files}
    card = files["README.md"].text() or ""
    assert 'from_pretrained("user/draft")' in card
    assert "model_cards/" not in card
    assert "was not measured" in card
    records = json.loads(files["provenance.json"].text() or "")
    assert {"design", "align", "ship"} <= records.keys()


def test_a_reduced_vocabulary_goes_along(run_folder: Path, shelf: Path) -> None:
    write_reduced_vocabulary(run_folder / "draft", ReducedVocabulary((0, 1, 2, 5)))
    ship(run_folder, shelf, check=False)
    found = read_reduced_vocabulary(shelf)
    assert found is not None
    assert found.token_ids == (0, 1, 2, 5)


def test_a_draft_in_bfloat16_stays_as_it_is(run_folder: Path, shelf: Path, tmp_path: Path) -> None:
    ship(run_folder, shelf, check=False)
    again = ship(shelf, tmp_path / "model_cards" / "again", check=False)
    assert again.facts["cast_from"] == ["bfloat16"]
    assert again.facts["note"] == ""
    one, other = (load_file(f / "model.safetensors") for f in (shelf, again.folder))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_checkpoint_in_parts(run_folder: Path, shelf: Path) -> None:
    draft = run_folder / "draft"
    model = AutoModelForCausalLM.from_pretrained(draft)
    (draft / "model.safetensors").unlink()
    model.save_pretrained(draft, max_shard_size="20KB")
    assert len(list(draft.glob("*.safetensors"))) > 1
    ship(run_folder, shelf, check=False)
    loaded = AutoModelForCausalLM.from_pretrained(shelf)
    for name, parameter in model.named_parameters():
        assert torch.equal(loaded.get_parameter(name), parameter.to(torch.bfloat16))


def test_what_is_too_large_is_not_written(
    run_folder: Path, shelf: Path, fastdraft: Command
) -> None:
    words = ("ship", run_folder, "--to", shelf, "--no-check", "--max-megabytes")
    status, said = fastdraft(*words, "0.01")
    assert status == 2
    assert "--max-megabytes: the weights are 0.1 MB in bfloat16, more than 0.01" in said
    assert not shelf.parent.exists() or list(shelf.parent.iterdir()) == []
    assert fastdraft(*words, "1")[0] == 0


def test_a_folder_is_replaced_only_when_told(
    run_folder: Path, shelf: Path, tiny_model: Any
) -> None:
    ship(run_folder, shelf, check=False)
    (shelf / "notes.txt").write_text("of the older draft", encoding="utf-8")
    first = (shelf / "model.safetensors").read_bytes()
    tiny_model(seed=5).save_pretrained(run_folder / "draft")
    with pytest.raises(FastDraftError, match="has no num_assistant_tokens"):
        ship(run_folder, shelf, check=False, overwrite=True)
    store_draft_settings(run_folder / "draft", 3)
    with pytest.raises(FastDraftError, match="exists; replace it with --overwrite"):
        ship(run_folder, shelf, check=False)
    assert (shelf / "model.safetensors").read_bytes() == first
    ship(run_folder, shelf, check=False, overwrite=True)
    assert (shelf / "model.safetensors").read_bytes() != first
    assert not (shelf / "notes.txt").exists()
    assert [p.name for p in shelf.parent.iterdir()] == [shelf.name]


@pytest.mark.parametrize("moment", ["while writing", "between the two renames", "before deleting"])
def test_a_kill_leaves_the_old_or_the_new(
    run_folder: Path, shelf: Path, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ship(run_folder, shelf, check=False)
    old = (shelf / "README.md").read_text(encoding="utf-8")
    aside = shelf.with_name(f".{shelf.name}.old")
    if moment == "while writing":
        half = shelf.with_name(f".{shelf.name}.partial")
        half.mkdir()
        (half / "model.safetensors").write_bytes(b"half")
    elif moment == "between the two renames":
        shelf.rename(aside)
    else:
        shutil.copytree(shelf, aside)
    with pytest.raises(FastDraftError, match="exists; replace it"):
        ship(run_folder, shelf, check=False)
    assert (shelf / "README.md").read_text(encoding="utf-8") == old
    ship(run_folder, shelf, check=False, overwrite=True)
    assert [p.name for p in shelf.parent.iterdir()] == [shelf.name]


def test_a_disk_that_is_full_leaves_the_old_folder(
    run_folder: Path, shelf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ship(run_folder, shelf, check=False)
    before = {p: p.read_bytes() for p in shelf.rglob("*") if p.is_file()}

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    (plan,) = plan_push(run_folder, "model_cards/Tiny-FastDraft")
    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(OSError, match="No space"):
        write_files(plan.files, shelf, overwrite=True)
    assert {p: p.read_bytes() for p in shelf.rglob("*") if p.is_file()} == before


def test_text_that_is_not_the_targets_is_refused(
    run_folder: Path, shelf: Path, tiny_target_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastdraft_hf.decode import assisted

    real = assisted.decode

    def wrong(*args: Any, draft: Any = None, **given: Any) -> Any:
        record = real(*args, draft=draft, **given)
        if draft is not None:
            record.tokens[2] += 1
        return record

    monkeypatch.setattr(assisted, "decode", wrong)
    monkeypatch.setattr("fastdraft_hf._ties.LOGIT_TOLERANCE", 0.0)
    with pytest.raises(FastDraftError, match="is not the target's own after 'The harbour") as said:
        ship(run_folder, shelf, target=str(tiny_target_folder))
    assert "it parts at token 3" in str(said.value)
    assert not shelf.exists()


def test_weights_that_are_not_finite_are_refused(run_folder: Path, shelf: Path) -> None:
    path = run_folder / "draft" / "model.safetensors"
    tensors = load_file(path)
    name = sorted(tensors)[0]
    tensors[name].view(-1)[0] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(FastDraftError, match=f"{name} is not finite"):
        ship(run_folder, shelf, check=False)


def test_a_draft_of_another_vocabulary(
    run_folder: Path, shelf: Path, tiny_target_folder: Path, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(tiny_target_folder, tmp_path / "other"))
    tokenizer = AutoTokenizer.from_pretrained(other)
    tokenizer.add_tokens(["<|more|>"])
    tokenizer.save_pretrained(other)
    with pytest.raises(FastDraftError, match="its vocabulary is not the target's"):
        ship(run_folder, shelf, target=str(other))


def test_bad_input_is_one_line(run_folder: Path, shelf: Path, tmp_path: Path) -> None:
    with pytest.raises(FastDraftError, match="there is no folder"):
        ship(tmp_path / "none", shelf)
    with pytest.raises(FastDraftError, match="is the draft itself"):
        ship(run_folder, run_folder / "draft", overwrite=True)
    with pytest.raises(FastDraftError, match="--repo: give the owner as well"):
        ship(run_folder, shelf, repo="name")
    alone = Path(shutil.copytree(run_folder / "draft", tmp_path / "alone"))
    card = "---\nbase_model: org/Target\n---\n# Mine\n"
    (alone / "README.md").write_text(card, encoding="utf-8")
    with pytest.raises(FastDraftError, match="--target: no record says whose draft this is"):
        ship(alone, shelf)
    shutil.rmtree(run_folder / "draft")
    with pytest.raises(FastDraftError, match="holds no finished draft yet"):
        ship(run_folder, shelf)
    assert not shelf.exists()


def test_the_generation_config_keeps_gamma(run_folder: Path, shelf: Path) -> None:
    ship(run_folder, shelf, check=False)
    assert GenerationConfig.from_pretrained(shelf).num_assistant_tokens == 3
