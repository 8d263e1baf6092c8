"""Is the text that an engine samples with a draft distributed as the target's own?

    python benchmarks/audit.py [--engine openvino] [--gamma 3] [--distance 0.02]

Two tokens after a few prompts are sampled many times, with the target alone and with the draft, at
temperature 1 in float32, and counted in cells: the likeliest pairs, and the rest. The counts are
compared with the exact probabilities, which the target gives in float32, by Pearson's chi-square
test. Engine `wrong` is the target alone at temperature 1.1, which the test must find. The exit
status is 1 if the samples with the draft are distributed otherwise.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from fastdraft_hf._progress import Progress
from fastdraft_hf.cli.run import quiet_libraries
from fastdraft_hf.decode.settings import set_draft_length
from fastdraft_hf.decode.speculative import assisted_decoding
from fastdraft_hf.export.openvino import cached_openvino
from fastdraft_hf.target.resolve import resolve_target

ENGINES = ("transformers", "ours", "openvino", "ours-openvino", "wrong")
# The likeliest first tokens, and second tokens after each, that have a cell of their own.
_FIRST, _SECOND = 4, 2
_REST = -1
# Two are counted; with four, the first block of γ = 3 is not cut short.
_NEW_TOKENS = 4
# A correct engine is called wrong once in a thousand audits.
LEVEL = 1e-3
# Texts with several likely ways to continue.
PROMPTS = ("The best thing about", "def add(a, b):\n    return", "She opened the door and")

Cell = tuple[int, int]
# (prompt, seeds) -> the new tokens of one sample for each seed
Sampler = Callable[[Sequence[int], Sequence[int]], Iterable[Sequence[int]]]


class Audit(NamedTuple):
    """Counts of one engine against the exact distribution.

    Attributes:
        samples: of all prompts.
        p_value: chance that a correct engine's counts are as far off.
        distance: total variation between counts and exact probabilities, averaged over prompts.
            It is not 0 for a correct engine either: chance alone gives ``by_chance``.
    """

    samples: int
    p_value: float
    distance: float
    by_chance: float

    @property
    def passed(self) -> bool:
        return self.p_value > LEVEL


def samples_needed(distance: float) -> int:
    """Return how many samples find this total variation in nine of ten audits.

    With total variation δ, chi-square grows by at least 4nδ² over its mean (Cauchy-Schwarz); the
    normal approximation of the test's distribution gives n.
    """
    df = len(PROMPTS) * _FIRST * (_SECOND + 1)
    critical = df * (1 - 2 / (9 * df) + 3.09 * math.sqrt(2 / (9 * df))) ** 3  # Wilson-Hilferty
    growth = 1.0
    while df + growth - 1.28 * math.sqrt(2 * (df + 2 * growth)) < critical:
        growth += 0.5
    return math.ceil(growth / (4 * distance**2))


def exact_cells(target: Any, prompt: Sequence[int]) -> dict[Cell, float]:
    """Return the probability of every cell: pairs of tokens, with -1 for all others."""

    def after(rows: list[list[int]]) -> torch.Tensor:
        with torch.inference_mode():
            output = target(input_ids=torch.tensor(rows), logits_to_keep=1)
        logits: torch.Tensor = output.logits[:, -1]
        return logits.double().softmax(-1)

    first = after([list(prompt)])[0].topk(_FIRST)
    tokens = first.indices.tolist()
    second = after([[*prompt, token] for token in tokens]).topk(_SECOND)
    cells: dict[Cell, float] = {}
    for token, chance, ids, chances in zip(
        tokens, first.values.tolist(), second.indices.tolist(), second.values.tolist(), strict=True
    ):
        cells |= {(token, other): chance * p for other, p in zip(ids, chances, strict=True)}
        cells[token, _REST] = chance * (1 - sum(chances))
    cells[_REST, _REST] = 1 - float(first.values.sum())
    return cells


def cell_of(tokens: Sequence[int], cells: dict[Cell, float]) -> Cell:
    """Return the cell of a sample's first two tokens; a text that ends early has -1 there."""
    first, second = (*tokens, _REST, _REST)[:2]
    found = ((first, second), (first, _REST), (_REST, _REST))
    return next(cell for cell in found if cell in cells)


def judge_counts(found: Sequence[tuple[Counter[Cell], dict[Cell, float]]]) -> Audit:
    """Test the counts of several prompts together; cells that expect fewer than five are merged."""
    statistic = distance = by_chance = 0.0
    df = samples = 0
    for counts, cells in found:
        n = counts.total()
        samples += n
        merged: dict[Cell, list[float]] = {}
        for cell, chance in cells.items():
            one = merged.setdefault(cell if chance * n >= 5 else (_REST, _REST), [0.0, 0.0])
            one[0] += counts[cell]
            one[1] += chance * n
        statistic += sum((o - e) ** 2 / max(e, 1e-9) for o, e in merged.values())
        df += len(merged) - 1
        distance += sum(abs(o - e) for o, e in merged.values()) / (2 * n * len(found))
        # The mean absolute value of a normal variable is √(2/π) of its deviation.
        spread = sum(math.sqrt(e * (1 - e / n)) for _, e in merged.values())
        by_chance += math.sqrt(2 / math.pi) * spread / (2 * n * len(found))
    halves = torch.tensor([df / 2, statistic / 2], dtype=torch.float64)
    return Audit(samples, float(torch.special.gammaincc(*halves)), distance, by_chance)


def audit(
    target: Any, sample: Sampler, prompts: Sequence[Sequence[int]], samples: int, title: str
) -> Audit:
    """Sample after every prompt and test the counts.

    Args:
        target: a PyTorch causal LM in float32.
        sample: the engine.
        prompts: token ids.
        samples: of all prompts together.
        title: of the progress bar.
    """
    found = []
    share = math.ceil(samples / len(prompts))
    with Progress(title, share * len(prompts), "samples") as progress:
        for number, prompt in enumerate(prompts):
            cells, counts = exact_cells(target, prompt), Counter[Cell]()
            for tokens in sample(prompt, range(number * share, (number + 1) * share)):
                counts[cell_of(tokens, cells)] += 1
                progress.advance(1)
            found.append((counts, cells))
    return judge_counts(found)


def open_sampler(engine: str, target: Path, draft: Path | None, gamma: int) -> Sampler:
    """Return a function that samples with an engine at temperature 1, in float32.

    Args:
        engine: ``transformers``, ``ours``, ``openvino`` (GenAI) or ``ours-openvino``.
        target: folder of the checkpoint.
        draft: its draft's; ``None`` for the target alone.
        gamma: drafted tokens per round.
    """
    exact = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
    if engine == "openvino":
        return _genai(target, draft, gamma, exact)

    def load(folder: Path) -> Any:
        if engine == "ours-openvino":
            from optimum.intel import OVModelForCausalLM

            exported = str(cached_openvino(folder, "fp32"))
            return OVModelForCausalLM.from_pretrained(exported, export=False, ov_config=exact)
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    model = load(target)
    given: dict[str, Any] = {"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": 1.0}
    rows = 64
    if engine == "wrong":
        given["temperature"] = 1.1
    if draft is not None:
        given["assistant_model"] = load(draft)
        set_draft_length(given["assistant_model"].generation_config, gamma)
        if engine == "transformers":
            rows = 1  # stock assisted generation takes one prompt
        else:
            given["custom_generate"] = assisted_decoding

    def sample(prompt: Sequence[int], seeds: Sequence[int]) -> Iterable[Sequence[int]]:
        for start in range(0, len(seeds), rows):
            part = seeds[start : start + rows]
            set_seed(part[0])
            ids = torch.tensor([list(prompt)] * len(part))
            with torch.inference_mode():
                found = model.generate(
                    ids, attention_mask=torch.ones_like(ids), max_new_tokens=_NEW_TOKENS, **given
                )
            yield from found[:, len(prompt) :].tolist()

    return sample


def _genai(target: Path, draft: Path | None, gamma: int, exact: dict[str, str]) -> Sampler:
    """Return OpenVINO GenAI as a sampler: many requests at once, each with a seed of its own."""
    import numpy
    import openvino
    import openvino_genai as genai

    scheduler = genai.SchedulerConfig()
    scheduler.cache_size = 1  # GB
    options: dict[str, Any] = dict(exact)
    if draft is not None:
        folder = str(cached_openvino(draft, "fp32"))
        options["draft_model"] = genai.draft_model(folder, "CPU", **exact)
    folder = str(cached_openvino(target, "fp32"))
    pipeline = genai.ContinuousBatchingPipeline(folder, scheduler, "CPU", options)

    def config(seed: int) -> Any:
        one = genai.GenerationConfig()
        one.max_new_tokens, one.do_sample, one.rng_seed = _NEW_TOKENS, True, seed
        if draft is not None:
            one.num_assistant_tokens = gamma
        return one

    def sample(prompt: Sequence[int], seeds: Sequence[int]) -> Iterable[Sequence[int]]:
        for start in range(0, len(seeds), 64):
            part = seeds[start : start + 64]
            ids = [openvino.Tensor(numpy.array([prompt], dtype=numpy.int64)) for _ in part]
            for result in pipeline.generate(ids, [config(seed) for seed in part]):
                yield result.m_generation_ids[0]

    return sample


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--target", default="embedded:smollm2-135m-instruct")
    shipped = Path(__file__).parents[1] / "model_cards" / "SmolLM2-135M-Instruct-FastDraft"
    parser.add_argument("--draft", type=Path, default=shipped)
    parser.add_argument("--engine", choices=ENGINES, default="ours", help="openvino is GenAI")
    parser.add_argument("--gamma", type=int, default=3, help="drafted tokens per round")
    parser.add_argument(
        "--distance",
        type=float,
        default=0.02,
        help="total variation that nine of ten audits find; half of it takes four times as long",
    )
    args = parser.parse_args()
    quiet_libraries()
    target, draft = resolve_target(args.target).path, args.draft.resolve()
    tokenizer = AutoTokenizer.from_pretrained(target)
    prompts = [tokenizer(text)["input_ids"] for text in PROMPTS]
    exact = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).eval()
    samples = samples_needed(args.distance)
    print(f"{samples:,} samples find a total variation of {args.distance:g}")
    failed = 0
    for name, used in (("the target alone", None), (f"with the draft, γ = {args.gamma}", draft)):
        if args.engine == "wrong" and used is not None:
            continue
        sample = open_sampler(args.engine, target, used, args.gamma)
        found = audit(exact, sample, prompts, samples, f"{args.engine}, {name}")
        print(
            f"{args.engine}, {name}: total variation {found.distance:.4f} (chance alone: "
            f"{found.by_chance:.4f}), p = {found.p_value:.2g}: "
            f"{'as the target' if found.passed else f'NOT as the target (p < {LEVEL:g})'}",
            flush=True,
        )
        failed = int(not found.passed)
    return failed


if __name__ == "__main__":
    sys.exit(main())
