"""Compare the kinds of initialization at equal training budget.

    python benchmarks/init.py --run runs/smollm2-from-nothing [--tokens 300k] [--only prune]

Needs a finished stage `generate` in --run. All drafts have the same parameter budget and depth and
train on the same rows in the same order for the same number of tokens, first `pretrain`, then
`align`; only `design.init` (and where its layers come from) differs. Measured is the expected,
teacher-forced acceptance at T = 0.6 and γ = 3 on the target's completions of held-out prompts, with
95% bootstrap intervals over prompts, before and after training. The gain over `scratch` is paired
by prompt.

`--donor` adds a transplant from that model (an id or a folder), such as a Gemma-3-270M.
`--depths 2,3,4 --only "prune, first layers"` compares each named kind at several depths.

Finished work is kept in --work, and a killed run resumes.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from objectives import _show, alphas_of, expected, gain, held_out, interval
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastdraft_hf._atomic import write_json
from fastdraft_hf._config import parse_count
from fastdraft_hf.cli.run import quiet_libraries
from fastdraft_hf.eval.prompts import draw_prompts
from fastdraft_hf.recipe import Recipe, build_recipe, read_recipe
from fastdraft_hf.stages.runner import Run, execute
from fastdraft_hf.target.resolve import resolve_target

KINDS: dict[str, dict[str, Any]] = {
    "scratch": {"init": "scratch"},
    "project": {"init": "project"},
    "prune, evenly spaced": {"init": "prune"},
    "prune, first layers": {"init": "prune", "layers": "first"},
}


def slug(name: str) -> str:
    """Return a name as part of a path."""
    return name.replace(", ", "-").replace(" ", "-")


def recipe_for(base: Recipe, design: dict[str, Any], tokens: tuple[int, int]) -> Recipe:
    """Return ``base`` with another initialization and both training stages cut to ``tokens``."""
    data = base.resolved()
    plain = {"hidden_size": None, "intermediate_size": None, "layers": "even"}
    data["design"] = {**data["design"], **plain, **design}
    data["continue"] = data["logits"] = data["reduced_vocabulary"] = None
    for stage, count in zip(("pretrain", "align"), tokens, strict=True):
        data[stage] = {**data[stage], "max_train_tokens": count, "max_minutes": None}
        if stage == "align":
            data[stage]["objective"] = "ce"
    return build_recipe(data)


def trained(recipe: Recipe, run: Path, work: Path) -> tuple[Path, Path]:
    """Run design, pretrain and align in a folder of their own; return first and last draft."""
    work.mkdir(parents=True, exist_ok=True)
    if not (work / "generate").exists():
        (work / "generate").symlink_to((run / "generate").resolve())
    execute(Run(recipe, work), ["design", "pretrain", "align"])
    return work / "design", work / "align"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--run", type=Path, default=Path("runs/smollm2-from-nothing"))
    parser.add_argument("--recipe", type=Path, help="by default the one in --run")
    parser.add_argument("--work", type=Path, help="where drafts go; RUN/first-weights")
    parser.add_argument("--params", type=parse_count, default=11_700_000)
    parser.add_argument("--pretrain-tokens", type=parse_count, default=64_000)
    parser.add_argument("--tokens", type=parse_count, default=300_000, help="of alignment")
    parser.add_argument("--prompts", type=int, default=60, help="of each held-out set")
    parser.add_argument("--donor", help="also a transplant from this model, an id or a folder")
    parser.add_argument("--only", help="some kinds, by name, separated by ';'")
    parser.add_argument("--depths", help="numbers of layers, by default the recipe's one")
    args = parser.parse_args()
    quiet_libraries()
    work = args.work or args.run / "first-weights"
    base = read_recipe(args.recipe or args.run / "recipe.yaml")
    folder = resolve_target(base.target).path
    tokenizer = AutoTokenizer.from_pretrained(folder)
    kinds = {name: {"params": args.params, **design} for name, design in KINDS.items()}
    if args.donor:
        kinds["transplant"] = {
            "params": args.params,
            "init": "transplant",
            "donor": args.donor,
        }
    chosen = args.only.split(";") if args.only else list(kinds)
    if args.depths:
        kinds = {
            f"{name}, {depth}": {**kinds[name], "num_hidden_layers": int(depth)}
            for name in chosen
            for depth in args.depths.split(",")
        }
        chosen = list(kinds)
    missing = [name for name in chosen if not (work / f"{slug(name)}.json").exists()]
    if missing:
        target = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        prompts = draw_prompts(tokenizer, base.evaluate.tasks, args.prompts, 400, base.seed)
        texts, reference = held_out(base, folder, target, prompts, work)
        del target
    for name in missing:
        recipe = recipe_for(base, kinds[name], (args.pretrain_tokens, args.tokens))
        folders = trained(recipe, args.run, work / slug(name))
        alphas = []
        for made in folders:
            draft = AutoModelForCausalLM.from_pretrained(made, dtype=torch.float32).eval()
            alphas.append(alphas_of(draft, texts, reference))
        facts = json.loads((folders[0] / "provenance.json").read_text())["facts"]
        learnt = json.loads((folders[1] / "provenance.json").read_text())["facts"]
        write_json(
            work / f"{slug(name)}.json",
            {"design": facts, "tokens": learnt["tokens"], "before": alphas[0], "after": alphas[1]},
        )
    table({n: json.loads((work / f"{slug(n)}.json").read_text()) for n in chosen}, args)


def table(results: dict[str, dict[str, Any]], args: argparse.Namespace) -> None:
    """Print the results as Markdown."""
    print(
        f"budget {args.params:,} parameters; {args.pretrain_tokens:,} tokens of pre-training, then "
        f"{args.tokens:,} of alignment; expected acceptance at γ = 3, T = 0.6\n"
    )
    print("| initialization | parameters | width | untrained | trained | gain over scratch |")
    print("|---|---|---|---|---|---|")
    scratch = results.get("scratch")
    for name, found in results.items():
        cells = [_show(interval(found[when], expected)) for when in ("before", "after")]
        cells.append("")
        if scratch is not None and name != "scratch":
            pairs = list(zip(found["after"], scratch["after"], strict=True))
            cells[-1] = _show(interval(pairs, gain), "+.3f")
        design = found["design"]
        print(
            f"| {name} | {design['draft_parameters']:,} | {design['hidden_size']} | "
            f"{' | '.join(cells)} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
