"""`trainer.push_to_hub()` with the real client."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from hub_server import TOKEN, HubServer
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastdraft_hf.train.trainer import DraftDistillationConfig, DraftDistillationTrainer

Make = Callable[..., Any]


@pytest.mark.parametrize("at_the_end", [False, True])
def test_it_pushes_a_draft_and_nothing_else(
    hub: HubServer, tmp_path: Path, tiny_model: Make, tiny_tokenizer: Any, at_the_end: bool
) -> None:
    ids = [5, 6, 7, 8, 9]
    trainer = DraftDistillationTrainer(
        model=tiny_model(seed=1),
        args=DraftDistillationConfig(
            output_dir=str(tmp_path / "out"),
            per_device_train_batch_size=2,
            dataset_kwargs={"skip_prepare_dataset": True},
            max_steps=2,
            save_steps=1,
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
            push_to_hub=at_the_end,
            hub_model_id="user/trained",
            hub_token=TOKEN,
            hub_private_repo=True,
        ),
        train_dataset=datasets.Dataset.from_list([{"input_ids": ids, "labels": ids}] * 4),
        processing_class=tiny_tokenizer,
    )
    trainer.train()
    assert all(len(repo.history()) == 1 for repo in hub.models.values())
    if at_the_end:
        trainer.save_model()  # as `Trainer` has it: this pushes
    else:
        trainer.push_to_hub(target="org/Target", commit_message="Done")
    repo = hub.models["user/trained"]
    assert repo.private
    first = repo.history()[0]
    assert [len(repo.history()), first.title] == [2, "Model save" if at_the_end else "Done"]
    assert set(first.files) == {
        ".gitattributes",
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    }
    assert not [n for n, e in first.files.items() if TOKEN.encode() in e.content]
    card = first.files["README.md"].content.decode()
    assert 'draft = AutoModelForCausalLM.from_pretrained("user/trained")' in card
    assert ("base_model: org/Target" in card) is not at_the_end
    again = AutoModelForCausalLM.from_pretrained("user/trained")
    trained = trainer.model.state_dict()
    assert all(torch.equal(trained[name], value) for name, value in again.state_dict().items())
    assert AutoTokenizer.from_pretrained("user/trained").eos_token == tiny_tokenizer.eos_token
