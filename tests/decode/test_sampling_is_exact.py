"""Sampled text is distributed as the target's own, shown by a chi-square test on three tokens."""

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest
import torch
from decoding_helpers import VOCABULARY, learned, write
from transformers import LlamaForCausalLM, LogitsProcessor, set_seed

from fastdraft_hf.decode import rules
from fastdraft_hf.decode.cached import CachedModel
from fastdraft_hf.decode.length import DraftLength
from fastdraft_hf.decode.lookup import PromptLookup
from fastdraft_hf.decode.loop import Loop
from fastdraft_hf.decode.scores import Scores
from fastdraft_hf.decode.settings import Drafting
from fastdraft_hf.decode.text import Stops, Text

RUNS = 10_000
# Where every run takes its time. `test_a_wrong_rule_fails_the_same_test` shows what it still sees.
FEWER = 5_000
PROMPT = [4, 1, 3]
Cells = dict[tuple[int, ...], float]

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {"top_k": 0},
    "temperature": {"temperature": 0.7, "top_k": 0},
    "top_k": {"temperature": 1.3, "top_k": 3},
    "top_p": {"top_k": 0, "top_p": 0.8},
    "processor": {"top_k": 0, "repetition_penalty": 1.5},
}


def exact(target: LlamaForCausalLM, sampling: dict[str, Any]) -> Cells:
    """Return the probability of every three tokens after the prompt, by asking for each."""
    chances: Cells = {(): 1.0}
    for _ in range(3):
        ids = torch.tensor([[*PROMPT, *cell] for cell in chances])
        step = write(
            target,
            ids,
            max_new_tokens=1,
            do_sample=True,
            return_dict_in_generate=True,
            output_scores=True,
            **sampling,
        )
        shares = step.scores[0].softmax(-1).tolist()
        chances = {
            (*cell, token): chance * share
            for (cell, chance), row in zip(chances.items(), shares, strict=True)
            for token, share in enumerate(row)
            if share > 0
        }
    return chances


def p_value(observed: Iterable[tuple[int, ...]], expected: Cells) -> float:
    """Return the chi-square p-value; cells that expect fewer than five are taken together."""
    counts = Counter(observed)
    runs = sum(counts.values())
    if set(counts) - set(expected):
        return 0.0
    rare = {cell for cell, chance in expected.items() if chance * runs < 5}
    cells = [(counts[c], expected[c] * runs) for c in expected if c not in rare]
    if sum(expected[c] for c in rare) * runs >= 5:
        cells.append((sum(counts[c] for c in rare), sum(expected[c] for c in rare) * runs))
    statistic = sum((o - e) ** 2 / e for o, e in cells)
    half = torch.tensor([(len(cells) - 1) / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))


def sample(
    target: Any,
    draft: Any,
    sampling: dict[str, Any],
    *,
    rows: int,
    gamma: int | str,
    copies: int = 0,
    runs: int = RUNS,
) -> list[tuple[int, ...]]:
    """Return three sampled tokens of every run, ``rows`` runs a batch."""
    set_seed(0)
    found: list[tuple[int, ...]] = []
    ids = torch.tensor([PROMPT] * rows)
    while len(found) < runs:
        # Five tokens, so that the first three come of blocks of every length.
        given = {"copies": copies, "max_new_tokens": 5, "do_sample": True, **sampling}
        output = write(target, ids, draft, gamma, **given)
        found += [tuple(row) for row in output[:, len(PROMPT) : len(PROMPT) + 3].tolist()]
    return found


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize(("gamma", "copies"), [(1, 0), (3, 0), (1, 1)])
def test_batches_of_samples(
    pair: tuple[LlamaForCausalLM, LlamaForCausalLM], name: str, gamma: int, copies: int
) -> None:
    target, draft = pair
    # A processor that reads the text is asked row by row.
    runs = RUNS if name != "processor" else FEWER if gamma == 3 else 2_000
    given: dict[str, Any] = {"gamma": gamma, "copies": copies, "runs": runs}
    found = sample(target, draft, SETTINGS[name], rows=500, **given)
    assert p_value(found, exact(target, SETTINGS[name])) > 1e-3


class Table(CachedModel):
    """A model whose next token depends on the last alone; the cache is the tokens themselves."""

    def __init__(self, table: torch.Tensor) -> None:
        super().__init__(torch.device("cpu"))
        self.table = table
        self.cache = torch.zeros(1, 0, dtype=torch.long)

    def feed(
        self, tokens: torch.Tensor, positions: torch.Tensor, valid: Any, keep: int
    ) -> torch.Tensor:
        # Every token must be in the cache at its own position: nothing lost, nothing stale.
        assert positions[0, 0] == self.cache.shape[1]
        self.cache = torch.cat([self.cache, tokens], 1)
        return self.table[tokens[:, -keep:]]

    def rollback(self, fed: int, kept: Sequence[int]) -> None:
        self.cache = self.cache[:, : self.cache.shape[1] - fed + kept[0]]

    def select(self, rows: Sequence[int]) -> None:
        raise AssertionError("a single row is never selected")


class EverySecond(LogitsProcessor):
    """Prefers token 2 at every second call: a processor with a state of its own."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return scores + 1.5 * (self.calls % 2 == 0) * torch.eye(VOCABULARY)[2]


@pytest.mark.parametrize(
    ("stateful", "ratio", "by_cost", "copies"),
    [
        (False, 1.0, False, False),
        (True, 1.0, False, False),
        (False, 0.6, False, False),
        (False, 1.0, True, False),
        (False, 1.0, False, True),
        (True, 1.0, False, True),
        (False, 1.0, True, True),
    ],
)
def test_single_samples_of_a_table(
    stateful: bool, ratio: float, by_cost: bool, copies: bool
) -> None:
    """A single row crops its cache instead of masking it, and may keep a state in a processor."""
    set_seed(0)
    target, draft = torch.randn(2, VOCABULARY, VOCABULARY).unbind(0)
    draft = (target + draft).clone()
    found = []
    ids = torch.tensor([[PROMPT[-1] if copies else PROMPT[0], *PROMPT[1:]]])
    positions = torch.arange(len(PROMPT))[None]
    drafting, of_pair = Drafting(3, temperature_ratio=ratio), learned(0.05, 0.05)
    drafted = set()
    for _ in range(FEWER):
        if by_cost:
            drafting.by_cost = DraftLength(of_pair)
        text = Text(ids, None, positions, 0)
        models = Table(target), Table(draft)
        stops = Stops(len(PROMPT) + 4)
        scores = Scores([EverySecond()] if stateful else [], VOCABULARY)
        loop = Loop(*models, text, scores, stops, drafting, True)
        loop.report = lambda _, *one: drafted.add(one)
        if copies:  # the prompt ends as it begins
            loop.lookup = PromptLookup(text, 1)
        loop.run()
        found.append(tuple(text.whole()[0, len(PROMPT) : len(PROMPT) + 3].tolist()))
    assert len(drafted) > 5
    step = target.softmax(-1)
    second = (target + 1.5 * stateful * torch.eye(VOCABULARY)[2]).softmax(-1)
    cells = {
        (a, b, c): float(step[PROMPT[-1], a] * second[a, b] * step[b, c])
        for a, b, c in itertools.product(range(VOCABULARY), repeat=3)
    }
    assert p_value(found, cells) > 1e-3


def test_the_cells_are_every_three_tokens(pair: tuple[LlamaForCausalLM, LlamaForCausalLM]) -> None:
    cells = exact(pair[0], SETTINGS["plain"])
    assert set(cells) == set(itertools.product(range(VOCABULARY), repeat=3))
    assert sum(cells.values()) == pytest.approx(1, abs=1e-5)
    assert max(cells.values()) < 0.5


def draws_from_p(
    drafts: torch.Tensor, q: torch.Tensor, p: torch.Tensor, limits: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """A wrong rule: after a rejection it draws from p instead of what is left of p."""
    accepted, _ = RIGHT(drafts, q, p, limits)
    rows = torch.arange(len(drafts))
    return accepted, torch.multinomial(p[rows, accepted], 1)[:, 0]


def keeps_too_many(
    drafts: torch.Tensor, q: torch.Tensor, p: torch.Tensor, limits: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """A wrong rule: it takes the draft for a little surer than it is."""
    return RIGHT(drafts, 0.8 * q, p, limits)


RIGHT = rules.accept_sampled


@pytest.mark.parametrize("wrong", [draws_from_p, keeps_too_many])
def test_a_wrong_rule_fails_the_same_test(
    pair: tuple[LlamaForCausalLM, LlamaForCausalLM],
    monkeypatch: pytest.MonkeyPatch,
    wrong: Callable[..., Any],
) -> None:
    monkeypatch.setattr(rules, "accept_sampled", wrong)
    target, draft = pair
    found = sample(target, draft, SETTINGS["plain"], rows=500, gamma=3, runs=FEWER)
    assert p_value(found, exact(target, SETTINGS["plain"])) < 1e-6


def test_rejections_at_a_closed_block_draw_from_the_target() -> None:
    """A row that drafted fewer than its neighbours has no draft where its block ends."""
    set_seed(0)
    p = torch.tensor([[[0.5, 0.5, 0.0]] * 3] * 4000)
    q = torch.tensor([[[1.0, 0.0, 0.0]] * 2] * 4000)
    drafts = torch.zeros(4000, 2, dtype=torch.long)
    accepted, token = rules.accept_sampled(drafts, q, p, torch.zeros(4000, dtype=torch.long))
    assert accepted.max() == 0
    assert token.float().mean() == pytest.approx(0.5, abs=0.04)
    accepted, token = rules.accept_sampled(drafts, q, p, torch.full((4000,), 2))
    assert (token[accepted == 0] == 1).all()


def test_a_block_keeps_more_than_its_tokens_one_by_one() -> None:
    """The example of Sun et al. 2024, section 3: 1.11 tokens by token, 1.22 by block."""
    set_seed(0)
    p = torch.tensor([[[1 / 3, 2 / 3]] * 3]).repeat(40_000, 1, 1)
    q = torch.tensor([[[2 / 3, 1 / 3]] * 2]).repeat(40_000, 1, 1)
    drafts = torch.multinomial(q[:, 0], 2, replacement=True)
    accepted, token = rules.accept_sampled(drafts, q, p, torch.full((40_000,), 2))
    assert accepted.float().mean() == pytest.approx(11 / 9, abs=0.02)
    # Two tokens of every row, the second from p where the block emitted one only.
    second = torch.where(accepted == 0, torch.multinomial(p[:, 0], 1)[:, 0], token)
    second = torch.where(accepted == 2, drafts[:, 1], second)
    first = torch.where(accepted == 0, token, drafts[:, 0])
    found = Counter(zip(first.tolist(), second.tolist(), strict=True))
    cells = {(a, b): (1 + a) * (1 + b) / 9 for a in (0, 1) for b in (0, 1)}
    assert p_value(found.elements(), cells) > 1e-3
