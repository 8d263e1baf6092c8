"""No timing: fine-tunes a target by LoRA, for a draft of the original to be aligned with it.

    python benchmarks/finetune_target.py --output runs/finetuned [--steps 40]
    python benchmarks/levers.py --target runs/finetuned --work runs/levers-finetuned \\
        --draft model_cards/SmolLM2-135M-Instruct-FastDraft --ways "more text, ce;LoRA, ce"

It learns to complete functions as the standard library does, without remarks.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import datasets
from alignment_data import split
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from fastdraft_hf.cli.run import quiet_libraries
from fastdraft_hf.target.resolve import resolve_target
from fastdraft_hf.train.config import has_fast_bf16


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--target", default="embedded:smollm2-135m-instruct")
    parser.add_argument("--output", type=Path, required=True, help="folder of the new target")
    parser.add_argument("--steps", type=int, default=40, help="of eight functions each")
    args = parser.parse_args()
    quiet_libraries()
    folder = resolve_target(args.target).path
    tokenizer = AutoTokenizer.from_pretrained(folder)
    _, functions = split(200, 8 * args.steps, seed=0)
    rows = [
        {
            "prompt": [{"role": "user", "content": one.instruction}],
            "completion": [{"role": "assistant", "content": one.answer}],
        }
        for one in functions
        if len(one.whole) < 1200
    ]
    trainer = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(folder, dtype="float32"),
        SFTConfig(
            output_dir=str(args.output.with_name(args.output.name + "-work")),
            max_steps=args.steps,
            per_device_train_batch_size=8,
            max_length=384,
            learning_rate=3e-4,
            logging_steps=10,
            save_strategy="no",
            report_to="none",
            bf16=has_fast_bf16("cpu"),
            gradient_checkpointing=False,
            use_cpu=True,
        ),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
    )
    trainer.train()
    merged = trainer.model.merge_and_unload()
    merged.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)


if __name__ == "__main__":
    main()
