"""What the trainer writes for the Hub; that it goes there is `tests/hub/test_trainer_push.py`."""

from __future__ import annotations

import pickle
from pathlib import Path

import datasets
import pytest
import torch
from huggingface_hub import ModelCard
from tiny_training import Make

from fastdraft_hf.train.trainer import DraftDistillationTrainer

TOKEN = "hf_" + "OnlyForThisTest" + "0123456789"


@pytest.fixture
def trained(
    trainer: Make, tmp_path: Path, tiny_model: Make, tiny_target_folder: Path
) -> DraftDistillationTrainer:
    ids = [5, 6, 7, 8, 9]
    made: DraftDistillationTrainer = trainer(
        datasets.Dataset.from_list([{"input_ids": ids, "labels": ids}] * 4),
        tiny_model(seed=1),
        teacher_model=str(tiny_target_folder),
        output_dir=str(tmp_path / "my-draft"),
        per_device_train_batch_size=2,
        objective={"ce": 0.5, "kl": 0.5},
        max_steps=2,
        save_strategy="steps",
        save_steps=1,
        hub_token=TOKEN,
    )
    made.train()
    return made


def test_the_card_is_ours_and_says_what_the_trainer_knows(
    trained: DraftDistillationTrainer,
) -> None:
    trained.create_model_card(model_name="Mine", dataset_name="user/rows", tags="extra")
    card = ModelCard.load(Path(trained.args.output_dir) / "README.md")
    assert card.data.base_model is None  # a folder's name is not an id
    assert card.data.datasets == ["user/rows"]
    assert {"fastdraft", "trl", "extra"} <= set(card.data.tags)
    assert card.data.eval_results is None
    for words in ("# Mine", "0.5 ce, 0.5 kl", "tokens in 2 steps", "Neither acceptance nor speed"):
        assert words in card.text, words
    assert "None" not in card.text
    assert "{{" not in card.text


def test_a_target_that_the_trainer_never_saw(trained: DraftDistillationTrainer) -> None:
    trained.create_model_card(target="org/Target")
    card = ModelCard.load(Path(trained.args.output_dir) / "README.md")
    assert card.data.base_model == "org/Target"
    assert 'from_pretrained("org/Target")' in card.text


def test_the_token_is_in_no_file(trained: DraftDistillationTrainer) -> None:
    trained.save_model()
    folder = Path(trained.args.output_dir)
    assert (folder / "training_args.bin").exists()  # else the next line looks at nothing
    held = [p for p in folder.rglob("*") if p.is_file() and TOKEN.encode() in p.read_bytes()]
    assert held == []
    args = pickle.loads(pickle.dumps(trained.args))
    assert args.hub_token is None
    assert args.max_steps == 2
    assert torch.load(folder / "training_args.bin", weights_only=False).hub_token is None
