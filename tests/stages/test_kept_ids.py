"""Ids that the target generated reach the loss as they are.

A target may spell a text by other tokens than its tokenizer would choose, at temperature 1 quite
often. Tokenized again, the draft would learn tokens that the target did not generate there.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from fastdraft_hf.data.corpus import open_completions
from fastdraft_hf.data.engines import Request
from fastdraft_hf.data.parts import write_rows
from fastdraft_hf.data.sources import Source
from fastdraft_hf.data.task_sets import Decontaminator
from fastdraft_hf.train.trainer import DraftDistillationConfig, DraftDistillationTrainer


@pytest.mark.parametrize(
    "settings", [{"max_length": 64}, {"padding_free": True, "max_length": None}]
)
def test_ids_of_a_row_are_the_labels_of_the_loss(
    tmp_path: Path,
    make_engine: Callable[..., Any],
    tiny_model: Callable[..., LlamaForCausalLM],
    tiny_tokenizer: PreTrainedTokenizerFast,
    settings: dict[str, Any],
) -> None:
    def spell(text: str) -> tuple[int, ...]:
        """Return one token per letter, as no tokenizer would."""
        ids = tuple(tiny_tokenizer.convert_tokens_to_ids(c) for c in text.replace(" ", "Ġ"))
        again = tiny_tokenizer(tiny_tokenizer.decode(ids), add_special_tokens=False)
        assert tuple(again["input_ids"]) != ids
        return ids

    words = ("the", "cat", "that hat", "on then in")
    engine = make_engine(lambda r: (*spell(words[r.index % 4] * 3), 40 + r.index, 2))
    requests = [Request(i, (1, *spell("the"), 60 + i), 0.0, i, 64, "mine") for i in range(12)]
    write_rows(engine, requests, tmp_path / "generate" / "mine")
    rows = open_completions(
        [Source(name="mine")],
        folder=tmp_path / "rows",
        generated=tmp_path / "generate",
        logits=None,
        tokenizer=tiny_tokenizer,
        decontaminator=Decontaminator([]),
        max_length=64,
        eval_rows=0,
        seed=0,
    ).train
    seen: dict[tuple[int, ...], tuple[int, ...]] = {}

    class Watching(DraftDistillationTrainer):
        """Notes what reaches the loss."""

        def compute_loss(self, model: Any, inputs: Any, *args: Any, **given: Any) -> Any:
            for ids, labels in zip(inputs["input_ids"], inputs["labels"], strict=True):
                _note(ids.tolist(), labels.tolist(), seen)
            return super().compute_loss(model, inputs, *args, **given)

    arguments = DraftDistillationConfig(
        output_dir=str(tmp_path / "out"),
        per_device_train_batch_size=4,
        num_train_epochs=1,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        dataset_kwargs={"skip_prepare_dataset": True},
        **settings,
    )
    model = tiny_model(seed=1)
    Watching(model, arguments, train_dataset=rows, processing_class=tiny_tokenizer).train()
    assert seen == {r.prompt_ids: engine.answer(r) for r in requests}


def _note(ids: list[int], labels: list[int], seen: dict[Any, Any]) -> None:
    """Split a row, or several in one, where labels start; note each prompt and its labels."""
    start = 0
    while start < len(ids):
        first = next((i for i in range(start, len(ids)) if labels[i] != -100), None)
        if first is None:  # padding
            return
        end = next((i for i in range(first, len(ids)) if labels[i] == -100), len(ids))
        assert ids[first:end] == labels[first:end]
        seen[tuple(ids[start:first])] = tuple(labels[first:end])
        start = end
