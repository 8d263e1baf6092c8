"""What one choice in a draft's design is worth at equal training budget.

    python benchmarks/design_choices.py init --run RUN --params 11.7M [--tokens 300k]
    python benchmarks/design_choices.py head --run RUN
    python benchmarks/design_choices.py shape --run RUN
    python benchmarks/design_choices.py depth --run RUN --depths 2,4,6

Needs a finished stage `generate` in RUN. All drafts train on the same rows in the same order, on as
many tokens of `pretrain` and then of `align`. They differ

- init: in `design.init`, and which layers are kept. `--donor` adds a transplant from that model;
- head: in their vocabulary, at equal bytes read per drafted token: a head of its own, one tied to
  the embeddings, and the most frequent quarter of the vocabulary, which leaves room for a wider
  draft (`reduced_vocabulary`; other engines read its full head). A tied draft of an untied target
  starts from the target's head, an untied one of a tied target from two copies;
- shape: in depth and feed-forward, at nearly equal bytes;
- depth: in layers, all as wide as the default design's two.

Measured is the expected, teacher-forced acceptance rate at T = 0.6 and γ = 3 on the target's
completions of held-out prompts, with 95% bootstrap intervals over prompts. The gain over the first
is paired by prompt. Nothing is timed. Finished work is kept in --work, and a killed run resumes.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from alignment_data import held_out, rate_gain, rounds
from objectives import _show, interval
from transformers import AutoModelForCausalLM, AutoTokenizer, PretrainedConfig

from fastdraft_hf._atomic import atomic_folder, read_json, write_json
from fastdraft_hf._config import parse_count
from fastdraft_hf._errors import FastDraftError
from fastdraft_hf.cli.run import quiet_libraries
from fastdraft_hf.draft.build import build, save_draft
from fastdraft_hf.draft.config import DesignConfig
from fastdraft_hf.draft.design import LAYERS, MOST_INNER, design_draft
from fastdraft_hf.draft.families import read_parameters, text_config
from fastdraft_hf.draft.reduced_vocabulary import load_draft
from fastdraft_hf.eval.expected import ExpectedRounds
from fastdraft_hf.eval.metrics import acceptance_rate
from fastdraft_hf.recipe import Recipe, build_recipe, read_recipe
from fastdraft_hf.stages.runner import Run, execute
from fastdraft_hf.target.resolve import load_config, resolve_target, stop_ids

ANSWER = 64
STEP_TOKENS = 4096


@dataclass
class Choice:
    """Settings of section ``design``; whether the head is tied; tokens that it scores."""

    design: dict[str, Any] = field(default_factory=dict)
    tied: bool | None = None
    scored: int | None = None


def initializations(args: argparse.Namespace) -> dict[str, Choice]:
    found = {
        "scratch": Choice({"init": "scratch"}),
        "project": Choice({"init": "project"}),
        "prune, evenly spaced": Choice({"init": "prune"}),
        "prune, first layers": Choice({"init": "prune", "layers": "first"}),
    }
    if args.donor:
        found["transplant"] = Choice({"init": "transplant", "donor": args.donor})
    return {
        f"{name}, {depth} layers": Choice(
            {**choice.design, "params": args.params, "num_hidden_layers": depth}
        )
        for name, choice in found.items()
        for depth in args.depths
    }


def read_by(target: PretrainedConfig, choice: Choice) -> int:
    """Return the parameters that a draft reads per token."""
    return read_parameters(design_draft(target, DesignConfig(**choice.design)), choice.scored)


def widest(
    target: PretrainedConfig, choice: Choice, budget: int, step: int, times: int = MOST_INNER
) -> Choice:
    """Return ``choice`` with the widest draft that reads at most 1% more than ``budget``.

    Its width is a multiple of ``step``, its feed-forward ``times`` as wide.
    """
    best: Choice | None = None
    for width in range(step, target.hidden_size + 1, step):
        inner = min(times * width, target.intermediate_size)
        design = {**choice.design, "hidden_size": width, "intermediate_size": inner}
        wide = Choice(design, choice.tied, choice.scored)
        try:
            if read_by(target, wide) <= 1.01 * budget:
                best = wide
        except FastDraftError:  # heads do not divide such a width
            continue
    assert best is not None
    return best


def heads(target: PretrainedConfig) -> dict[str, Choice]:
    quarter = target.vocab_size // 4
    reduced = widest(target, Choice(scored=quarter), read_by(target, Choice()), 64)
    return {
        "untied": Choice(tied=False),
        "tied": Choice(tied=True),
        f"{quarter:,} tokens, wider": reduced,
    }


def shapes(target: PretrainedConfig) -> dict[str, Choice]:
    budget, found = read_by(target, Choice()), {}
    for layers, times in ((2, 6), (2, 4), (2, 2), (3, 3), (4, 2), (1, 6)):
        choice = Choice({"num_hidden_layers": layers})
        found[f"{layers} layers, {times} x width"] = widest(target, choice, budget, 16, times)
    return found


def depths(target: PretrainedConfig, numbers: list[int]) -> dict[str, Choice]:
    draft = design_draft(target, DesignConfig(num_hidden_layers=LAYERS))
    sizes = {name: getattr(draft, name) for name in ("hidden_size", "intermediate_size")}
    return {f"{n} layers": Choice({"num_hidden_layers": n, **sizes}) for n in numbers}


def recipe_for(base: Recipe, choice: Choice, draft: Path, tokens: tuple[int, int]) -> Recipe:
    """Return ``base`` with this draft to start from, and both training stages cut to ``tokens``."""
    data = base.resolved()
    data["design"] = DesignConfig(draft=str(draft)).model_dump()
    data["max_hours"] = data["continue"] = data["logits"] = data["reduced_vocabulary"] = None
    if choice.scored:
        data["reduced_vocabulary"] = {"draft_vocab_size": choice.scored}
    for stage, count in zip(("pretrain", "align"), tokens, strict=True):
        data[stage] |= {"max_train_tokens": count, "max_minutes": None, "start_weight": 0.0}
        length = data[stage]["max_length"] = min(data[stage]["max_length"], 1024)
        data[stage]["per_device_train_batch_size"] = STEP_TOKENS // length
    data["align"] |= {"objective": "ce", "target_distribution": "none"}
    return build_recipe(data)


def write_start(work: Path, target: Path, choice: Choice, seed: int) -> None:
    """Write the untrained draft, and facts about it."""
    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).eval()
    text = model.config.get_text_config()
    if choice.tied is not None and choice.tied != text.tie_word_embeddings:
        text.tie_word_embeddings = choice.tied
        head = model.get_output_embeddings().weight
        if choice.tied:
            model.get_input_embeddings().weight = head
        else:
            model.get_output_embeddings().weight = torch.nn.Parameter(head.detach().clone())
    draft, facts = build(model, DesignConfig(**choice.design), seed)
    facts["read"] = read_by(text, choice)
    write_json(work / "facts.json", facts)
    with atomic_folder(work / "start") as temporary:
        save_draft(draft, temporary)


def trained(recipe: Recipe, run: Path, work: Path) -> Path:
    """Run the stages in a folder of their own; return the last draft."""
    work.mkdir(parents=True, exist_ok=True)
    if not (work / "generate").exists():
        (work / "generate").symlink_to((run / "generate").resolve())
    last = "align" if recipe.reduced_vocabulary is None else "reduced_vocabulary"
    made = Run(recipe, work)
    execute(made, list(dict.fromkeys(["design", "pretrain", "align", last])))
    return made.stage_folder(last)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("compare", choices=["init", "head", "shape", "depth"])
    parser.add_argument("--run", type=Path, default=Path("runs/smollm2-from-nothing"))
    parser.add_argument("--work", type=Path, help="where drafts go; by default RUN/choices")
    parser.add_argument("--params", type=parse_count, help="of init; by default the design's own")
    parser.add_argument(
        "--depths",
        type=lambda text: [int(n) for n in text.split(",")],
        default=[2],
        help="of init and depth: numbers of layers, such as 2,3,4",
    )
    parser.add_argument("--donor", help="of init: also a transplant from this model")
    parser.add_argument("--pretrain-tokens", type=parse_count, default=64_000)
    parser.add_argument("--tokens", type=parse_count, default=300_000, help="of alignment")
    parser.add_argument("--prompts", type=int, default=40, help="held out, of each task set")
    parser.add_argument("--only", help="some of them, by name, separated by ;")
    args = parser.parse_args()
    quiet_libraries()
    work = args.work or args.run / "choices"
    base = read_recipe(args.run / "recipe.yaml")
    folder = resolve_target(base.target).path
    config = text_config(load_config(folder, "target"))
    found = {
        "init": lambda: initializations(args),
        "head": lambda: heads(config),
        "shape": lambda: shapes(config),
        "depth": lambda: depths(config, args.depths),
    }[args.compare]()
    if args.only:
        found = {name: found[name] for name in args.only.split(";")}
    budget = f"{args.pretrain_tokens}-{args.tokens}-{args.params}"
    paths = {name: work / f"{name}-{budget}".replace(", ", "-").replace(" ", "-") for name in found}
    texts = held_out(folder, args.prompts, work, ANSWER)
    ends = stop_ids(folder, AutoTokenizer.from_pretrained(folder))
    target = None
    for name, choice in found.items():
        path = paths[name]
        if (path / f"rounds-{args.prompts}.json").exists():
            continue
        if not (path / "start").exists():
            write_start(path, folder, choice, base.seed)
        tokens = args.pretrain_tokens, args.tokens
        last = trained(recipe_for(base, choice, path / "start", tokens), args.run, path / "run")
        if target is None:
            target = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        draft = load_draft(last, dtype="float32").eval()
        counts = rounds(target, draft, texts, ends, name, ANSWER)
        write_json(path / f"rounds-{args.prompts}.json", counts)
    print(
        f"\n{base.target}: {args.pretrain_tokens:,} tokens of pre-training, {args.tokens:,} of "
        f"alignment; expected acceptance rate, {len(texts)} prompts, γ = 3, T = 0.6\n"
    )
    tasks = [text.task for text in texts]
    names = list(dict.fromkeys(tasks))
    heading = ("width / feed-forward", "parameters", "read", *names, "gain over the first")
    print(f"| {args.compare} | {' | '.join(heading)} |")
    print("|" + "---|" * (5 + len(names)))
    first = None
    for name, path in paths.items():
        facts = read_json(path / "facts.json")
        rows = [ExpectedRounds(*one) for one in read_json(path / f"rounds-{args.prompts}.json")]
        sizes = (f"{facts[key] / 1e6:.1f}M" for key in ("draft_parameters", "read"))
        cells = [f"{facts['hidden_size']} / {facts['intermediate_size']:,}", *sizes]
        for task in names:
            some = [r for r, t in zip(rows, tasks, strict=True) if t == task]
            cells.append(_show(interval(some, acceptance_rate)))
        gain = ""
        if first is not None:
            gain = _show(interval(list(zip(rows, first, strict=True)), rate_gain), "+.3f")
        first = first or rows
        print(f"| {name} | {' | '.join(cells)} | {gain} |")


if __name__ == "__main__":
    main()
