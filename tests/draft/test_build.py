"""`build_draft`, and the stage that writes its result."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastdraft_hf import (
    DraftDistillationConfig,
    DraftDistillationTrainer,
    FastDraftError,
    build_draft,
    save_draft,
)
from fastdraft_hf.recipe import build_recipe
from fastdraft_hf.stages.runner import Run, execute
from fastdraft_hf.target.resolve import Target

IDS = torch.tensor([[40, 41, 42, 250]])
SHAPE: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1}


def design(target: Path, folder: Path, **section: Any) -> Path:
    run = Run(build_recipe({"seed": 3, "design": section}), folder, Target(target, "target"))
    execute(run, ["design"])
    return run.stage_folder("design")


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(IDS).logits
    return found


@pytest.fixture
def target(tiny_target_folder: Path, tmp_path: Path) -> Path:
    """A target whose turns end on two tokens, with what a training run leaves in a config."""
    folder = tmp_path / "target"
    shutil.copytree(tiny_target_folder, folder)
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 0]}')
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config |= {"_name_or_path": "/home/me/secret", "use_cache": False}
    config["_model_name_or_path"] = "secret of a converter"
    config["auto_map"] = {"AutoConfig": "mine.Config"}
    file.write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("init", ["scratch", "project", "prune"])
def test_it_is_the_draft_of_stage_design(target: Path, tmp_path: Path, init: Any) -> None:
    folder = design(target, tmp_path / "run", init=init, **SHAPE)
    written = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    draft = build_draft(str(target), init=init, seed=3, **SHAPE)
    torch.testing.assert_close(logits(draft), logits(written))
    loaded = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    draft = build_draft(loaded, init=init, seed=3, **SHAPE)
    torch.testing.assert_close(logits(draft), logits(written))
    save_draft(draft, tmp_path / "saved")
    saved = {path.name: path for path in (tmp_path / "saved").iterdir()}
    for path in folder.iterdir():
        if path.name not in ("provenance.json", "config.yaml"):
            assert path.read_bytes() == saved[path.name].read_bytes(), path.name


def test_what_is_the_targets_and_what_is_not(target: Path, tmp_path: Path) -> None:
    draft = build_draft(target, "15k", num_hidden_layers=1)
    assert draft.num_parameters() <= 15_000
    assert draft.config.name_or_path == ""
    save_draft(draft, tmp_path / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert loaded.generation_config.eos_token_id == [2, 0]
    ours, theirs = (AutoTokenizer.from_pretrained(f) for f in (tmp_path / "saved", target))
    assert ours.get_vocab() == theirs.get_vocab()
    assert ours.chat_template == theirs.chat_template is not None
    text = (tmp_path / "saved" / "config.json").read_text(encoding="utf-8")
    config = json.loads(text)
    assert config["use_cache"] is True
    assert not {"auto_map", "quantization_config", "_name_or_path"} & config.keys()
    assert "secret" not in text
    assert str(tmp_path) not in text


def test_a_target_without_a_generation_config(target: Path, tmp_path: Path) -> None:
    (target / "generation_config.json").unlink()
    folder = design(target, tmp_path / "run", **SHAPE)
    assert AutoModelForCausalLM.from_pretrained(folder).generation_config.eos_token_id == 2


def test_a_model_that_came_from_no_folder(tiny_model: Any, tmp_path: Path) -> None:
    draft = build_draft(tiny_model(), **SHAPE)
    with pytest.raises(FastDraftError, match="the draft has no tokenizer"):
        save_draft(draft, tmp_path)
    with pytest.raises(FastDraftError, match=r"^params: .*'many'"):
        build_draft(tiny_model(), "many")


def test_it_is_trained_with_the_targets_tokenizer(target: Path, tmp_path: Path) -> None:
    rows = Dataset.from_list([{"input_ids": [40, 41, 42, 2], "labels": [-100, 41, 42, 2]}] * 4)
    args = DraftDistillationConfig(str(tmp_path), max_steps=1, report_to="none", use_cpu=True)
    draft = build_draft(target, **SHAPE)
    trainer = DraftDistillationTrainer(model=draft, args=args, train_dataset=rows)
    trainer.train()
    trainer.save_model()
    assert AutoTokenizer.from_pretrained(tmp_path).get_vocab() == draft.tokenizer.get_vocab()


def test_a_given_draft_is_resized_on_request(tiny_target_folder: Path, tmp_path: Path) -> None:
    # The draft's head is padded by eight rows; the tokens are the same.
    draft = AutoModelForCausalLM.from_pretrained(tiny_target_folder)
    rows = draft.config.vocab_size
    draft.resize_token_embeddings(rows + 8, mean_resizing=False)
    given = tmp_path / "given"
    draft.save_pretrained(given)
    AutoTokenizer.from_pretrained(tiny_target_folder).save_pretrained(given)
    message = (
        rf"design\.draft: .* have the target's rows: the heads score {rows} and {rows + 8} ids"
    )
    with pytest.raises(FastDraftError, match=f"{message}: padding.*set design.resize"):
        design(tiny_target_folder, tmp_path / "one", draft=str(given))
    folder = design(tiny_target_folder, tmp_path / "two", draft=str(given), resize=True)
    made = AutoModelForCausalLM.from_pretrained(folder)
    assert made.config.vocab_size == rows == made.lm_head.weight.shape[0]
