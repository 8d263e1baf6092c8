"""A target is fine-tuned; its old draft is re-aligned by LoRA: acceptance before and after.

    python benchmarks/realign.py --draft runs/smollm2-quickstart/align --work runs/realign

The embedded target learns, by LoRA, to answer "complete this function" prompts with the standard
library's own bodies, and is merged and saved: an ordinary checkpoint. `fastdraft run` then lets it
write and trains adapters on the old draft. Measured on the fine-tuned target's answers to HumanEval
prompts (T = 0.6): the expected acceptance rate at γ = 3, paired by prompt, of the old draft and
the new one; and that greedy text with the new draft is the target's own. What is finished in
--work is kept.
"""

from __future__ import annotations

import argparse
import ast
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import torch
from objectives import _show, alphas_of, expected, gain, held_out, interval
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from fastdraft_hf._atomic import atomic_folder
from fastdraft_hf._config import parse_count
from fastdraft_hf.cli._running import quiet_libraries
from fastdraft_hf.data.heldout import CODE_INSTRUCTION
from fastdraft_hf.data.python_source import documented_functions
from fastdraft_hf.decode.assisted import decode
from fastdraft_hf.eval.prompts import draw_prompts
from fastdraft_hf.recipe import build_recipe
from fastdraft_hf.target.resolve import resolve_target

TARGET = "embedded:smollm2-135m-instruct"


def pairs(count: int) -> list[dict[str, Any]]:
    """Return "complete this function" chats whose answers are the functions themselves."""
    found = []
    for node, lines in documented_functions():
        if not isinstance(node, ast.FunctionDef) or node.col_offset:
            continue
        head = "\n".join(lines[node.lineno - 1 : node.body[0].end_lineno])
        whole = "\n".join(lines[node.lineno - 1 : node.end_lineno])
        if len(head) >= 60 and len(whole) <= 1200:
            found.append((CODE_INSTRUCTION.format(head), f"```python\n{whole}\n```"))
    random.Random(0).shuffle(found)
    return [
        {
            "prompt": [{"role": "user", "content": asked}],
            "completion": [{"role": "assistant", "content": answer}],
        }
        for asked, answer in found[:count]
    ]


def fine_tune(folder: Path, steps: int) -> None:
    """Write the fine-tuned, merged target."""
    source = resolve_target(TARGET).path
    arguments = SFTConfig(
        output_dir=str(folder.parent / "fine-tuning"),
        max_steps=steps,
        per_device_train_batch_size=4,
        learning_rate=5e-4,
        max_length=384,
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        save_strategy="no",
        report_to="none",
        logging_steps=10,
        seed=0,
    )
    trainer = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32),
        args=arguments,
        train_dataset=datasets.Dataset.from_list(pairs(steps * 4)),
        processing_class=AutoTokenizer.from_pretrained(source),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
    )
    trainer.train()
    with atomic_folder(folder) as temporary:
        trainer.model.merge_and_unload().save_pretrained(temporary)
        for path in source.glob("*"):  # tokenizer, chat template, generation config
            if path.suffix in (".json", ".jinja", ".txt") and path.name != "config.json":
                shutil.copy(path, temporary)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--draft", type=Path, required=True, help="a draft of the embedded target")
    parser.add_argument("--work", type=Path, default=Path("runs/realign"))
    parser.add_argument("--steps", type=int, default=60, help="of fine-tuning, 4 rows each")
    parser.add_argument("--rows", type=int, default=600, help="answers the fine-tuned one writes")
    parser.add_argument("--tokens", type=parse_count, default=150_000, help="of re-alignment")
    parser.add_argument("--prompts", type=int, default=40)
    args = parser.parse_args()
    quiet_libraries()
    tuned = args.work / "target"
    if not tuned.exists():
        args.work.mkdir(parents=True, exist_ok=True)
        fine_tune(tuned, args.steps)
    overrides = {
        "target": str(tuned),
        "output_dir": str(args.work / "run"),
        "design.draft": str(args.draft),
        "generate.sets.code": f"{{kind: code, rows: {args.rows}, max_new_tokens: 192}}",
        "align.sources": "[{kind: generated, name: code}]",
        "align.lora": "{r: 16}",
        "align.max_train_tokens": str(args.tokens),
        "align.per_device_train_batch_size": "3",
    }
    for stage in ("design", "generate", "align"):
        words = [f"{key}={value}" for key, value in overrides.items()]
        command = [sys.executable, "-m", "fastdraft_hf.cli.main", stage, "--config", _empty(args)]
        subprocess.run([*command, *words], check=True)
    recipe = build_recipe({"target": str(tuned)})
    tokenizer = AutoTokenizer.from_pretrained(tuned)
    target = AutoModelForCausalLM.from_pretrained(tuned, dtype=torch.float32).eval()
    prompts = draw_prompts(tokenizer, ["humaneval"], args.prompts, 400, 0)
    texts, reference = held_out(recipe, tuned, target, prompts, args.work)
    before, after = (
        AutoModelForCausalLM.from_pretrained(folder).eval()
        for folder in (args.draft, args.work / "run" / "align")
    )
    old, new = (alphas_of(draft, texts, reference) for draft in (before, after))
    print("\n| draft | expected acceptance rate, γ = 3 | gain |")
    print("|---|---|---|")
    print(f"| as it was | {_show(interval(old, expected))} | |")
    both = list(zip(new, old, strict=True))
    print(
        f"| re-aligned by LoRA | {_show(interval(new, expected))} | "
        f"{_show(interval(both, gain), '+.3f')} |"
    )
    same = 0
    for prompt in prompts[:8]:
        alone, assisted = (
            decode(
                target,
                prompt.ids,
                task=prompt.task,
                key=prompt.key,
                max_new_tokens=48,
                temperature=0.0,
                seed=0,
                draft=draft,
                num_assistant_tokens=3,
                path="ours",
            ).tokens
            for draft in (None, after)
        )
        same += alone == assisted
    print(f"\ngreedy text with the re-aligned draft is the target's own: {same} of 8 prompts")


def _empty(args: argparse.Namespace) -> str:
    path = args.work / "recipe.yaml"
    path.write_text("seed: 0\n", encoding="utf-8")
    return str(path)


if __name__ == "__main__":
    main()
