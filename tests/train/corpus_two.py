"""Two processes train on a corpus and note what they read; `scale_out.py` calls this in both.

Once on written blocks, and once on a stream.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch


def main(folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from fastdraft_hf.data.corpus import open_corpus
    from fastdraft_hf.data.sources import Source
    from fastdraft_hf.train.trainer import DraftDistillationConfig, DraftDistillationTrainer

    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")

    class Watching(DraftDistillationTrainer):
        read: list[list[int]]

        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            self.read.extend(inputs["input_ids"].tolist())
            return super().compute_loss(model, inputs, *args, **kwargs)

    source = Source(kind="files", name=str(folder / "text.jsonl"))
    for name in ("blocks", "stream"):
        corpus = open_corpus(
            [source],
            tokenizer,
            folder=folder / ("data" if name == "blocks" else "streamed"),
            tokens=24 * 8,
            max_length=8,
            eval_rows=0,
            seed=0,
            generated=folder,
            streaming=name == "stream",
        )
        args = DraftDistillationConfig(
            output_dir=str(folder / name),
            per_device_train_batch_size=2,
            max_steps=6,
            bf16=False,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        )
        trainer = Watching(
            model=AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32),
            args=args,
            train_dataset=corpus.train,
            processing_class=tokenizer,
        )
        trainer.read = []
        trainer.train()
        (folder / f"{name}.{rank}.json").write_text(json.dumps(trainer.read), encoding="utf-8")
