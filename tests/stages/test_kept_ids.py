"""The re-tokenisation trap: ids that the target emitted reach the loss as they are.

A target may spell a text by other tokens than its tokenizer would choose, at temperature 1 quite
often. Tokenised again, the draft would learn tokens that the target did not write there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from fastdraft_hf.data.completions import open_completions
from fastdraft_hf.data.decontaminate import Decontaminator
from fastdraft_hf.data.engines import Completion, Request
from fastdraft_hf.data.generations import write_rows
from fastdraft_hf.data.sources import Source
from fastdraft_hf.recipe import build_recipe
from fastdraft_hf.stages.runner import Run
from fastdraft_hf.target.resolve import Target
from fastdraft_hf.train.trainer import DraftDistillationConfig, DraftDistillationTrainer


class Spelling:
    """A target that spells words letter by letter, each row another word."""

    name = "spelling"

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        self.written: dict[tuple[int, ...], tuple[int, ...]] = {}

    def generate(
        self, requests: Iterable[Request], on_tokens: Callable[[int], None]
    ) -> Iterator[Completion]:
        for request in requests:
            text = ("the", "cat", "that hat", "on then in")[request.index % 4] * 3
            letters = [self.tokenizer.convert_tokens_to_ids(c) for c in text.replace(" ", "Ġ")]
            ids = (*letters, 40 + request.index, 2)
            self.written[request.prompt_ids] = ids
            yield Completion(request, ids, "stop")


@pytest.mark.parametrize(
    "settings", [{"max_length": 64}, {"padding_free": True, "max_length": None}]
)
def test_ids_of_a_row_are_the_labels_of_the_loss(
    tmp_path: Path,
    tiny_target_folder: Path,
    tiny_model: Callable[..., LlamaForCausalLM],
    tiny_tokenizer: PreTrainedTokenizerFast,
    settings: dict[str, Any],
) -> None:
    recipe = build_recipe(
        {
            "device": "cpu",
            "generate": {"sets": {"mine": {}}},
            "align": {"sources": [{"name": "mine"}], "max_length": 64, "eval_rows": 0},
        }
    )
    run = Run(recipe, tmp_path / "run", Target(tiny_target_folder, "tiny"))
    engine = Spelling(tiny_tokenizer)
    # Prompts, too, are spelled as no tokenizer would.
    the = [tiny_tokenizer.convert_tokens_to_ids(c) for c in "the"]
    requests = [Request(i, (1, *the, 60 + i), 0.0, i, 64, "mine") for i in range(12)]
    write_rows(engine, requests, run.stage_folder("generate") / "mine", rows_per_part=5)
    for prompt, ids in engine.written.items():  # the trap is there
        for spelled in (ids[:-2], prompt[1:4]):
            again = tiny_tokenizer(tiny_tokenizer.decode(spelled), add_special_tokens=False)
            assert tuple(again["input_ids"]) != spelled

    rows, _, _ = open_completions(
        [Source(name="mine")],
        folder=tmp_path / "rows",
        generated=run.stage_folder("generate"),
        logits=None,
        tokenizer=tiny_tokenizer,
        decontaminator=Decontaminator([]),
        max_length=64,
        eval_rows=0,
        seed=0,
    )
    assert len(rows) == 12

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
    Watching(
        model=tiny_model(seed=1),
        args=arguments,
        train_dataset=rows,
        processing_class=tiny_tokenizer,
    ).train()
    assert seen == engine.written


def _note(ids: list[int], labels: list[int], seen: dict[Any, Any]) -> None:
    """Cut a row, or several in one, at where labels begin; note each prompt and its labels."""
    start = 0
    while start < len(ids):
        first = next((i for i in range(start, len(ids)) if labels[i] != -100), None)
        if first is None:  # padding
            return
        end = next((i for i in range(first, len(ids)) if labels[i] == -100), len(ids))
        assert ids[first:end] == labels[first:end]
        seen[tuple(ids[start:first])] = tuple(labels[first:end])
        start = end
