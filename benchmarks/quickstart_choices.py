"""Which initialization, optimizer and layers give most at the quickstart's budget.

    python benchmarks/quickstart_choices.py --run runs/smollm2-quickstart [--tokens 150k]

Every variant trains from its own initialization on the alignment data of a finished run, the same
tokens in the same order, and is measured by teacher-forced expected acceptance at T = 0.6 on
answers that the target wrote to held-out prompts. One row a variant; the run's draft comes last.
The choices were made on 48 prompts of each set, so small differences (0.01) mean nothing.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import datasets
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from fastdraft_hf._config import parse_count
from fastdraft_hf.cli._running import quiet_libraries
from fastdraft_hf.data.corpora import build_completions
from fastdraft_hf.data.decontaminate import Decontaminator
from fastdraft_hf.data.engines import open_engine
from fastdraft_hf.data.requests import requests_for
from fastdraft_hf.draft.design import design_draft
from fastdraft_hf.draft.init import init
from fastdraft_hf.eval.expected import (
    Continuation,
    expected_acceptance,
    expected_acceptance_rate,
    log_probabilities,
)
from fastdraft_hf.eval.prompts import draw_prompts
from fastdraft_hf.export.openvino import cached_openvino
from fastdraft_hf.recipe import Recipe, read_recipe
from fastdraft_hf.target.resolve import resolve_target, stop_ids
from fastdraft_hf.train.loop import train

TEMPERATURE, GAMMA = 0.6, 3

# name: (changes to `design`, changes to `align`)
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "slice, Muon (the recipe)": ({}, {}),
    "slice, Muon, half the rates": ({}, {"matrix_learning_rate": 2e-3, "learning_rate": 5e-4}),
    "slice, Muon, twice the rates": ({}, {"matrix_learning_rate": 8e-3, "learning_rate": 2e-3}),
    "slice, AdamW 2e-3": (
        {},
        {"matrix_optimizer": "adamw", "matrix_learning_rate": 2e-3, "learning_rate": 2e-3},
    ),
    "project, Muon": ({"init": "project"}, {}),
    "scratch, Muon": ({"init": "scratch"}, {}),
    "scratch, AdamW 2e-3": (
        {"init": "scratch"},
        {"matrix_optimizer": "adamw", "matrix_learning_rate": 2e-3, "learning_rate": 2e-3},
    ),
    "slice, Muon, one layer": ({"num_hidden_layers": 1}, {}),
    "slice, Muon, three layers": ({"num_hidden_layers": 3, "params": 14_000_000}, {}),
    "slice, Muon, batch 6": ({}, {"per_device_train_batch_size": 6}),
}


def answers(recipe: Recipe, folder: Path, per_task: int) -> list[Continuation]:
    """Let the target answer held-out prompts at T = 0.6, through OpenVINO."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompts = draw_prompts(tokenizer, recipe.evaluate.tasks, per_task, 400, recipe.seed)
    engine = open_engine(
        "openvino",
        target=folder,
        openvino_target=cached_openvino(folder, "int8"),
        stop_ids=stop_ids(folder, tokenizer),
        batch_size=48,
        device="cpu",
    )
    requests = requests_for(
        [p.ids for p in prompts],
        temperatures=[TEMPERATURE],
        max_new_tokens=64,
        seed=recipe.seed,
        source="held-out",
    )
    return [
        Continuation(prompts[c.request.index].task, c.request.prompt_ids, c.ids)
        for c in engine.generate(requests, lambda tokens: None)
    ]


def measure(
    draft: Any, texts: list[Continuation], reference: list[torch.Tensor]
) -> dict[str, float]:
    alphas: dict[str, list[list[float]]] = {}
    for text, target in zip(texts, reference, strict=True):
        found = expected_acceptance(target.float(), log_probabilities(draft, text, TEMPERATURE))
        alphas.setdefault(text.task, []).append(found.tolist())
    alphas["overall"] = [row for rows in list(alphas.values()) for row in rows]
    return {task: expected_acceptance_rate(rows, GAMMA) for task, rows in alphas.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--run", type=Path, default=Path("runs/smollm2-quickstart"))
    parser.add_argument("--recipe", type=Path, default=Path("recipes/smollm2-135m/quickstart.yaml"))
    parser.add_argument("--tokens", type=parse_count, default=150_000)
    parser.add_argument("--prompts", type=int, default=48, help="held-out prompts of each set")
    parser.add_argument("--only", help="variants whose name holds this text")
    args = parser.parse_args()
    quiet_libraries()
    recipe = read_recipe(args.recipe)
    assert recipe.align is not None
    folder = resolve_target(recipe.target).path
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = answers(recipe, folder, args.prompts)
    target = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    # float16 keeps a distribution to three digits at half the memory.
    reference = [log_probabilities(target, text, TEMPERATURE).half() for text in texts]
    examples, _, _ = build_completions(
        recipe.align.sources,
        tokenizer,
        generated=args.run / "generate",
        overlaps=Decontaminator.of_task_sets().overlaps,
        max_length=512,
        seed=recipe.seed,
    )
    print(f"| variant | parameters | seconds | {' | '.join([*recipe.evaluate.tasks, 'overall'])} |")
    print("|---|---|---|" + "---|" * (len(recipe.evaluate.tasks) + 1))
    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch) / "data"
        datasets.Dataset.from_list(examples).save_to_disk(str(data / "train"))
        for number, (name, (design, align)) in enumerate(VARIANTS.items()):
            if args.only and args.only not in name:
                continue
            chosen = recipe.design.model_copy(update=design)
            config = design_draft(AutoConfig.from_pretrained(folder), chosen)
            draft, _ = init(folder, config, chosen, recipe.seed)
            start_model = Path(scratch) / f"start-{number}"
            draft.save_pretrained(start_model)
            changes = {"max_train_tokens": args.tokens, "max_minutes": None, "save_steps": 100_000}
            stage = recipe.align.model_copy(update={**changes, **align})
            work = Path(scratch) / f"work-{number}"
            start = time.perf_counter()
            train(start_model, tokenizer, data, work, stage, seed=0, device="cpu", label=name)
            seconds = time.perf_counter() - start
            trained = AutoModelForCausalLM.from_pretrained(work / "model").eval()
            report(name, trained, seconds, measure(trained, texts, reference))
    for stage_name in ("pretrain", "continue", "align"):
        made = args.run / stage_name
        if made.exists():
            record = json.loads((made / "provenance.json").read_text())
            trained = AutoModelForCausalLM.from_pretrained(made).eval()
            name = f"the run, after {stage_name} ({record['facts']['tokens']:,} tokens)"
            report(name, trained, record["wall_seconds"], measure(trained, texts, reference))


def report(name: str, draft: Any, seconds: float, rates: dict[str, float]) -> None:
    cells = " | ".join(f"{rate:.3f}" for rate in rates.values())
    print(f"| {name} | {draft.num_parameters():,} | {seconds:.0f} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
