"""A draft to start from, trainers, and one start of two processes."""

from pathlib import Path
from typing import Any

import pytest
from scale_out import TwoProcesses, launch
from tiny_training import PLAIN, QUIET, Make

from fastdraft_hf.train.trainer import DraftDistillationConfig, DraftDistillationTrainer


@pytest.fixture(scope="session")
def two_processes(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Make, tiny_tokenizer: Any
) -> TwoProcesses:
    """Train in two processes, once in the session: starting them takes longer than training."""
    return launch(tmp_path_factory.mktemp("two_processes"), tiny_model, tiny_tokenizer)


@pytest.fixture(scope="session")
def start_model(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Make, tiny_tokenizer: Any
) -> Path:
    """A draft's folder. Its dropout draws random numbers, which must be resumed too."""
    folder = tmp_path_factory.mktemp("start")
    tiny_model(seed=1, attention_dropout=0.2, pard_token=287).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def trainer(tmp_path: Path, tiny_model: Make, tiny_tokenizer: Any) -> Make:
    """Make a trainer: ``trainer(dataset, model=…, teacher_model=…, **arguments of the config)``."""

    def make(
        dataset: Any,
        model: Any = None,
        eval_dataset: Any = None,
        teacher_model: Any = None,
        callbacks: Any = None,
        kind: Any = DraftDistillationTrainer,
        given: dict[str, Any] | None = None,
        **settings: Any,
    ) -> DraftDistillationTrainer:
        defaults = {
            "output_dir": str(tmp_path / "out"),
            "per_device_train_batch_size": 4,
            "save_strategy": "no",
            **PLAIN,
            **QUIET,
        }
        if not {"max_steps", "max_train_tokens"} & set(settings):
            defaults["max_steps"] = 3
        made: DraftDistillationTrainer = kind(
            model=tiny_model() if model is None else model,
            args=DraftDistillationConfig(**{**defaults, **settings}),
            train_dataset=dataset,
            eval_dataset=eval_dataset,
            callbacks=callbacks,
            teacher_model=teacher_model,
            **{"processing_class": tiny_tokenizer, **(given or {})},
        )
        return made

    return make
