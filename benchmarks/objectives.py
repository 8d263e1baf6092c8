"""Compare objectives of alignment by acceptance, at equal budget, on the real target.

    fastdraft run recipes/smollm2-135m/objectives.yaml
    python benchmarks/objectives.py --run runs/smollm2-objectives [--tokens 300k] [--only kl,tvd]

Every objective trains a copy of the run's pre-trained draft with the recipe's stage `align`: the
same rows in the same order, the same tokens and steps; only `align.objective` differs. Two measures
at T = 0.6 and γ = 3, with 95% bootstrap intervals over prompts: the acceptance rate of real
decoding, and the expected, teacher-forced one on the target's completions, which needs no decoding
and so uses many more prompts. The difference to `ce` is paired by prompt.

Finished work is kept in --work, and a killed run resumes.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastdraft_hf._atomic import atomic_file, write_json
from fastdraft_hf._config import parse_count
from fastdraft_hf._progress import Progress
from fastdraft_hf.cli.run import quiet_libraries
from fastdraft_hf.data.parts import build_requests
from fastdraft_hf.decode.assisted import decode
from fastdraft_hf.eval.expected import Continuation
from fastdraft_hf.eval.prompts import EvaluationPrompt, draw_prompts
from fastdraft_hf.recipe import Recipe, read_recipe
from fastdraft_hf.stages.generate import load_engine
from fastdraft_hf.stages.runner import Run, execute
from fastdraft_hf.target.resolve import resolve_target, stop_ids

TEMPERATURE, GAMMA = 0.6, 3
OBJECTIVES: dict[str, Any] = {
    "ce": "ce",
    "½ce + ½kl": {"ce": 0.5, "kl": 0.5},
    "kl": "kl",
    "tvd": "tvd",
    "½ce + ½tvd": {"ce": 0.5, "tvd": 0.5},
    "nla": "nla",
    "lk_hybrid": "lk_hybrid",
    "jsd": "jsd",
    "rkl": "rkl",
}
BASE = ("design", "generate", "logits", "pretrain", "continue")


def log_probabilities(model: Any, text: Continuation) -> torch.Tensor:
    """Return a model's log distributions [len(text.ids), V], one for every token of the text."""
    ids = torch.tensor([[*text.prompt_ids, *text.ids]], device=model.device)
    with torch.inference_mode():
        logits = model(input_ids=ids, logits_to_keep=len(text.ids) + 1).logits[0, :-1]
        return torch.log_softmax(logits.float() / TEMPERATURE, -1)


def expected_acceptance(target: torch.Tensor, draft: torch.Tensor) -> torch.Tensor:
    """Return α [T] from two log distributions [T, V]."""
    return torch.minimum(target, draft).exp().sum(-1)


def expected_acceptance_rate(alphas: Sequence[Sequence[float]], gamma: int) -> float:
    """Return expected accepted / drafted tokens if a round may start at any position."""
    accepted = drafted = 0.0
    for text in alphas:
        for start in range(len(text) - gamma + 1):
            chance = 1.0
            for alpha in text[start : start + gamma]:
                chance *= alpha
                accepted += chance
            drafted += gamma
    return accepted / drafted if drafted else 0.0


def align(recipe_path: Path, run: Path, work: Path, objective: Any, tokens: int) -> Path:
    """Run stage align in a folder of its own that shares everything before it."""
    recipe = read_recipe(
        recipe_path, [f"output_dir={work}", f"align.objective={json.dumps(objective)}"]
    )
    assert recipe.align is not None
    recipe.align.max_train_tokens, recipe.align.max_minutes = tokens, None
    if objective == "ce":  # its log takes acceptance from the stored distribution
        recipe.align.target_distribution = "stored"
    work.mkdir(parents=True, exist_ok=True)
    for stage in BASE:
        if (run / stage).exists() and not (work / stage).exists():
            (work / stage).symlink_to((run / stage).resolve())
    execute(Run(recipe, work), ["align"])
    return work / "align"


def held_out_answers(
    recipe: Recipe, folder: Path, prompts: list[EvaluationPrompt]
) -> list[Continuation]:
    """Return the target's completions of held-out prompts at T = 0.6."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    engine = load_engine("auto", folder, stop_ids(folder, tokenizer), 48)
    requests = build_requests(
        [p.ids for p in prompts],
        temperatures=[TEMPERATURE],
        max_new_tokens=64,
        seed=recipe.seed,
        source="held-out",
    )
    return [
        Continuation(prompts[c.request.index].task, c.request.prompt_ids, c.ids)
        for c in sorted(engine.generate(requests, lambda _: None), key=lambda c: c.request.index)
    ]


def held_out(
    recipe: Recipe, folder: Path, target: Any, prompts: list[EvaluationPrompt], work: Path
) -> tuple[list[Continuation], list[torch.Tensor]]:
    """Return the completions and the target's distributions over them; both are stored."""
    work.mkdir(parents=True, exist_ok=True)
    path, tables = work / f"answers-{len(prompts)}.json", work / f"answers-{len(prompts)}"
    if not path.exists():
        found = held_out_answers(recipe, folder, prompts)
        write_json(path, [[text.task, text.prompt_ids, text.ids] for text in found])
    texts = [
        Continuation(task, tuple(prompt), tuple(ids))
        for task, prompt, ids in json.loads(path.read_text(encoding="utf-8"))
    ]
    kept = tables.with_suffix(".safetensors")
    if not kept.exists():
        with Progress("the target reads its answers", len(texts), "answers") as progress:
            rows = {}
            for number, text in enumerate(texts):
                # float16 keeps a distribution to three digits at half the memory.
                rows[str(number)] = log_probabilities(target, text).half()
                progress.advance(1)
        with atomic_file(kept) as temporary:
            save_file(rows, temporary)
    loaded = load_file(kept)
    return texts, [loaded[str(number)] for number in range(len(texts))]


def alphas_of(
    draft: Any, texts: list[Continuation], reference: list[torch.Tensor]
) -> list[list[float]]:
    """Return α of every token of every text."""
    return [
        expected_acceptance(target.float(), log_probabilities(draft, text)).tolist()
        for text, target in zip(texts, reference, strict=True)
    ]


def decoded(
    target: Any, draft: Any, prompts: list[EvaluationPrompt], tokens: int, label: str
) -> list[tuple[int, int]]:
    """Return (accepted, drafted) tokens of each prompt, from decoding."""
    counts = []
    with Progress(f"{label}: decode", len(prompts), "answers") as progress:
        for number, prompt in enumerate(prompts):
            record = decode(
                target,
                prompt.ids,
                task=prompt.task,
                key=prompt.key,
                max_new_tokens=tokens,
                temperature=TEMPERATURE,
                seed=number,
                draft=draft,
                num_assistant_tokens=GAMMA,
            )
            counts.append((record.accepted, record.drafted))
            progress.advance(1)
    return counts


def interval(
    values: list[Any], statistic: Callable[[list[Any]], float], draws: int = 1000
) -> tuple[float, float, float]:
    """Return the statistic and its 95% bootstrap interval."""
    rng = random.Random(0)
    drawn = sorted(statistic(rng.choices(values, k=len(values))) for _ in range(draws))
    return statistic(values), drawn[int(0.025 * draws)], drawn[int(0.975 * draws)]


def rate(counts: list[Any]) -> float:
    return float(sum(a for a, _ in counts) / max(1, sum(d for _, d in counts)))


def expected(rows: list[Any]) -> float:
    return expected_acceptance_rate(rows, GAMMA)


def gain(pairs: list[Any]) -> float:
    return expected([new for new, _ in pairs]) - expected([old for _, old in pairs])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--run", type=Path, default=Path("runs/smollm2-objectives"))
    parser.add_argument("--recipe", type=Path, default=Path("recipes/smollm2-135m/objectives.yaml"))
    parser.add_argument("--work", type=Path, help="where drafts and results go; RUN/ablation")
    parser.add_argument("--tokens", type=parse_count, default=300_000)
    parser.add_argument("--prompts", type=int, default=60, help="teacher-forced, of each set")
    parser.add_argument("--decode", type=int, default=12, help="really decoded, of each set")
    parser.add_argument("--only", help="some of the objectives, by name, separated by commas")
    args = parser.parse_args()
    quiet_libraries()
    work = args.work or args.run / "ablation"
    recipe = read_recipe(args.recipe)
    folder = resolve_target(recipe.target).path
    tokenizer = AutoTokenizer.from_pretrained(folder)
    target = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    prompts = draw_prompts(tokenizer, recipe.evaluate.tasks, args.prompts, 400, recipe.seed)
    few = draw_prompts(tokenizer, recipe.evaluate.tasks, args.decode, 400, recipe.seed)
    chosen = args.only.split(",") if args.only else list(OBJECTIVES)
    missing = [n for n in chosen if not (work / f"{_slug(n)}.json").exists()]
    if missing:
        texts, reference = held_out(recipe, folder, target, prompts, work)
    for name in missing:
        trained = align(args.recipe, args.run, work / _slug(name), OBJECTIVES[name], args.tokens)
        draft = AutoModelForCausalLM.from_pretrained(trained).eval()
        facts = json.loads((trained / "provenance.json").read_text())
        alphas = alphas_of(draft, texts, reference)
        counts = decoded(target, draft, few, 64, name)
        write_json(
            work / f"{_slug(name)}.json",
            {
                "objective": OBJECTIVES[name],
                "tokens": facts["facts"]["tokens"],
                "steps": facts["facts"]["steps"],
                "seconds": facts["wall_seconds"],
                "tasks": [text.task for text in texts],
                "alphas": alphas,
                "few_tasks": [p.task for p in few],
                "counts": counts,
            },
        )
    results = {n: json.loads((work / f"{_slug(n)}.json").read_text()) for n in chosen}
    table(results, recipe.evaluate.tasks)
    if not args.only:
        for name in chosen:
            shutil.rmtree(work / _slug(name) / "align" / "work", ignore_errors=True)


def table(results: dict[str, dict[str, Any]], tasks: list[str]) -> None:
    first = next(iter(results.values()))
    few = len(first["few_tasks"]) // len(tasks)
    many = len(first["tasks"]) // len(tasks)
    print(f"γ = {GAMMA}, T = {TEMPERATURE}; {first['tokens']:,} tokens, {first['steps']:,} steps")
    print(f"decoded: {few} prompts of each set; expected: {many} of each set, teacher-forced\n")
    heads = [f"expected, {task}" for task in tasks]
    print(f"| objective | decoded | expected | gain over ce | {' | '.join(heads)} |")
    print("|---|" + "---|" * (3 + len(tasks)))
    base = results.get("ce")
    for name, found in results.items():
        cells = [_show(interval(found["counts"], rate)), _show(interval(found["alphas"], expected))]
        if base is None or name == "ce":
            cells.append("")
        else:
            pairs = list(zip(found["alphas"], base["alphas"], strict=True))
            cells.append(_show(interval(pairs, gain), "+.3f"))
        for task in tasks:
            rows = [a for a, t in zip(found["alphas"], found["tasks"], strict=True) if t == task]
            cells.append(f"{expected(rows):.3f}")
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def _show(triple: tuple[float, float, float], form: str = ".3f") -> str:
    value, low, high = (f"{number:{form}}" for number in triple)
    return f"{value} ({low} to {high})"


def _slug(name: str) -> str:
    return name.replace("½", "half-").replace(" + ", "-")


if __name__ == "__main__":
    main()
