"""Is the text that an engine samples with a draft distributed as the target's own?

Two tokens after a few prompts are sampled many times at temperature 1 in float32 and counted in
cells: the likeliest pairs, and the rest. The counts are compared with the exact probabilities,
which the target gives in float32, by Pearson's chi-square test.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastdraft_hf._progress import Progress

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


def open_sampler(
    engine: str, target: Path, draft: Path | None, gamma: int, server: str | None = None
) -> Sampler:
    """Return a function that samples with an engine at temperature 1, in float32.

    Args:
        engine: one of `eval.config.AUDITED`; ``openvino`` is GenAI.
        target: folder of the checkpoint.
        draft: its draft's; ``None`` for the target alone.
        gamma: drafted tokens per round.
        server: URL of vLLM or llama.cpp, which was started with the draft or without it.
    """
    if server is not None:
        return _server(engine, server)
    exact = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
    if engine == "openvino":
        return _genai(target, draft, gamma, exact)

    def load(folder: Path) -> Any:
        if engine == "ours-openvino":
            from optimum.intel import OVModelForCausalLM

            from fastdraft_hf.export.openvino import cached_openvino

            exported = str(cached_openvino(folder, "fp32"))
            return OVModelForCausalLM.from_pretrained(exported, export=False, ov_config=exact)
        from fastdraft_hf.draft.reduced_vocabulary import load_draft

        return load_draft(folder, dtype="float32").eval()

    assistant = None if draft is None else load(draft)
    return generate_sampler(load(target), assistant, gamma, stock=engine == "transformers")


def generate_sampler(target: Any, draft: Any, gamma: int, stock: bool) -> Sampler:
    """Sample by ``target.generate``: stock assisted generation, or through our loop."""
    from transformers import set_seed

    from fastdraft_hf.decode.settings import set_draft_length
    from fastdraft_hf.decode.speculative import assisted_decoding

    given: dict[str, Any] = {"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": 1.0}
    rows = 64
    if draft is not None:
        given["assistant_model"] = draft
        set_draft_length(draft.generation_config, gamma)
        if stock:
            rows = 1  # stock assisted generation takes one prompt
        else:
            given["custom_generate"] = assisted_decoding

    def sample(prompt: Sequence[int], seeds: Sequence[int]) -> Iterable[Sequence[int]]:
        for start in range(0, len(seeds), rows):
            part = seeds[start : start + rows]
            set_seed(part[0])
            ids = torch.tensor([list(prompt)] * len(part))
            with torch.inference_mode():
                found = target.generate(
                    ids, attention_mask=torch.ones_like(ids), max_new_tokens=_NEW_TOKENS, **given
                )
            yield from found[:, len(prompt) :].tolist()

    return sample


def _server(engine: str, url: str) -> Sampler:
    """Return a server as a sampler, with as many requests in flight as vLLM batches well."""
    from fastdraft_hf.eval.servers import CLIENTS

    server = CLIENTS[engine](url, "--server")

    def sample(prompt: Sequence[int], seeds: Sequence[int]) -> Iterable[Sequence[int]]:
        with ThreadPoolExecutor(128) as pool:
            for found in pool.map(lambda _: server.answer(prompt, _NEW_TOKENS, 1.0), seeds):
                yield found.ids

    return sample


def _genai(target: Path, draft: Path | None, gamma: int, exact: dict[str, str]) -> Sampler:
    """Return OpenVINO GenAI as a sampler: many requests at once, each with a seed of its own."""
    import numpy
    import openvino
    import openvino_genai as genai

    from fastdraft_hf.export.openvino import cached_openvino

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
