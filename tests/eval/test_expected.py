"""The teacher-forced estimator against decoding itself, written out over every possible outcome."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaForCausalLM

from fastdraft_hf.eval.expected import (
    Continuation,
    ExpectedRounds,
    TextAcceptance,
    add_rounds,
    expected_rounds,
    text_acceptance,
)

# A language of three tokens: the chance of the next depends on the last. Token 0 may end a text.
Chain = list[list[float]]
LONGEST = 4


def rows(weights: list[list[int]]) -> Chain:
    return [[w / sum(row) for w in row] for row in weights]


CHAINS = st.lists(st.lists(st.integers(1, 9), min_size=3, max_size=3), min_size=3, max_size=3).map(
    rows
)


def written(p: Chain, ends: set[int], text: tuple[int, ...] = ()) -> Iterator[tuple[float, tuple]]:
    """Yield every text the target may write, with its chance."""
    if len(text) == LONGEST or (text and text[-1] in ends):
        yield 1.0, text
        return
    for token, chance in enumerate(p[text[-1] if text else 1]):
        for rest, whole in written(p, ends, (*text, token)):
            yield chance * rest, whole


def seen(p: Chain, q: Chain, ends: set[int], text: tuple[int, ...]) -> TextAcceptance:
    alphas, kept, draft_ends = [], [], []
    for before, token in zip((1, *text), text, strict=False):
        one, other = p[before], q[before]
        alphas.append(sum(min(one[v], other[v]) for v in range(3) if v not in ends))
        kept.append(min(1.0, other[token] / one[token]))
        draft_ends.append(sum(other[v] for v in ends))
    return TextAcceptance(tuple(alphas), tuple(kept), tuple(draft_ends))


def teacher_forced(p: Chain, q: Chain, ends: set[int], gamma: int) -> ExpectedRounds:
    """The estimator's mean over all texts of the target."""
    parts = []
    for chance, text in written(p, ends):
        found = expected_rounds(seen(p, q, ends, text), gamma, LONGEST)
        parts.append(
            ExpectedRounds(
                chance * found.new_tokens,
                chance * found.target_passes,
                tuple(chance * d for d in found.drafted_by_position),
                tuple(chance * a for a in found.accepted_by_position),
            )
        )
    return add_rounds(parts)


def decoded(p: Chain, q: Chain, ends: set[int], gamma: int) -> ExpectedRounds:
    """The mean of real decoding: every draft, every coin and every correction, by its chance."""
    totals = {"tokens": 0.0, "rounds": 0.0}
    drafted, accepted = [0.0] * gamma, [0.0] * gamma

    def block(last: int, limit: int, chosen: tuple[int, ...] = ()) -> Iterator[tuple[float, tuple]]:
        if len(chosen) == limit or (chosen and chosen[-1] in ends):
            yield 1.0, chosen
            return
        for token, chance in enumerate(q[last]):
            for rest, whole in block(token, limit, (*chosen, token)):
                yield chance * rest, whole

    def play(text: tuple[int, ...], weight: float) -> None:
        if len(text) == LONGEST or (text and text[-1] in ends):
            totals["tokens"] += weight * len(text)
            return
        totals["rounds"] += weight
        last = text[-1] if text else 1
        for chance, tokens in block(last, min(gamma, LONGEST - len(text) - 1)):
            for place in range(len(tokens)):
                drafted[place] += weight * chance
            so_far, before, kept = weight * chance, last, 0
            for place, token in enumerate(tokens):
                keep = min(1.0, p[before][token] / q[before][token])
                rest = [max(0.0, p[before][v] - q[before][v]) for v in range(3)]
                if keep < 1:
                    for v in range(3):
                        own = so_far * (1 - keep) * rest[v] / sum(rest)
                        if own:
                            play((*text, *tokens[:place], v), own)
                so_far *= keep
                if token in ends:  # the record counts the end as the target's own token
                    play((*text, *tokens[: place + 1]), so_far)
                    so_far = 0.0
                    break
                accepted[place] += so_far
                before, kept = token, place + 1
            if so_far:
                for v in range(3):
                    play((*text, *tokens[:kept], v), so_far * p[before][v])

    play((), 1.0)
    return ExpectedRounds(totals["tokens"], totals["rounds"], tuple(drafted), tuple(accepted))


@given(CHAINS, CHAINS, st.integers(1, 4))
def test_it_is_what_decoding_counts(p: Chain, q: Chain, gamma: int) -> None:
    found, true = teacher_forced(p, q, set(), gamma), decoded(p, q, set(), gamma)
    assert found.new_tokens == pytest.approx(true.new_tokens) == pytest.approx(LONGEST)
    assert found.target_passes == pytest.approx(true.target_passes)
    assert found.drafted_by_position == pytest.approx(true.drafted_by_position)
    assert found.accepted_by_position == pytest.approx(true.accepted_by_position)


@given(CHAINS, CHAINS, st.integers(1, 3))
def test_texts_that_end_are_counted_to_their_end(p: Chain, q: Chain, gamma: int) -> None:
    found, true = teacher_forced(p, q, {0}, gamma), decoded(p, q, {0}, gamma)
    assert found.new_tokens == pytest.approx(true.new_tokens)
    assert found.target_passes == pytest.approx(true.target_passes)
    assert found.accepted_by_position == pytest.approx(true.accepted_by_position)
    # What a draft writes after a rejected token is not in any text.
    assert found.drafted_by_position[:2] == pytest.approx(true.drafted_by_position[:2])
    assert all(
        a >= b - 1e-9
        for a, b in zip(found.drafted_by_position, true.drafted_by_position, strict=True)
    )


@pytest.fixture(scope="module")
def pair(tiny_model: Callable[..., LlamaForCausalLM]) -> tuple[LlamaForCausalLM, LlamaForCausalLM]:
    return tiny_model(seed=0), tiny_model(seed=1, num_hidden_layers=1)


def test_a_text_is_read_as_its_distributions_say(
    pair: tuple[LlamaForCausalLM, LlamaForCausalLM],
) -> None:
    target, draft = pair
    text = Continuation("t", (40, 41, 42), (50, 51, 2))
    found = text_acceptance(target, draft, text, 2.0, {2, 7})
    with torch.no_grad():
        whole = torch.tensor([[*text.prompt_ids, *text.ids]])
        p, q = (torch.log_softmax(m(whole).logits[0, 2:-1] / 2.0, -1) for m in pair)
    shared = torch.minimum(p, q).exp()
    wanted = shared.sum(-1) - shared[:, [2, 7]].sum(-1)
    assert found.alphas == pytest.approx(wanted.tolist(), abs=1e-5)
    own = torch.tensor(text.ids)[:, None]
    ratio = (q.gather(1, own) - p.gather(1, own))[:, 0].exp().clamp(max=1)
    assert found.kept == pytest.approx(ratio.tolist(), abs=1e-5)
    assert found.draft_ends == pytest.approx(q[:, [2, 7]].exp().sum(-1).tolist(), abs=1e-5)
    same = text_acceptance(target, target, text, 2.0, ())
    assert same.alphas == pytest.approx((1.0,) * 3, abs=1e-5)
    assert same.kept == (1.0,) * 3


def test_a_narrower_head_is_read_over_the_targets_vocabulary(
    pair: tuple[LlamaForCausalLM, LlamaForCausalLM],
    tiny_model: Callable[..., LlamaForCausalLM],
) -> None:
    """A draft whose head scores some tokens only never has the others accepted."""
    target = pair[0]
    draft = tiny_model(seed=1, num_hidden_layers=1, tie_word_embeddings=False)
    scored = [50, 60, 70]
    head = torch.nn.Linear(32, 3, bias=False)
    with torch.no_grad():
        head.weight.copy_(draft.lm_head.weight[scored])
    draft.lm_head, draft.head_token_ids = head, torch.tensor(scored)
    text = Continuation("t", (40, 41), (50, 51))
    found = text_acceptance(target, draft, text, 1.0, ())
    assert found.kept[1] == 0.0  # 51 is not scored
    with torch.no_grad():
        p = target(torch.tensor([[40, 41, 50, 51]])).logits[0, 1:-1].softmax(-1)
    assert all(a <= p[i, scored].sum() + 1e-6 for i, a in enumerate(found.alphas))
