"""`num_assistant_tokens_schedule = "cost"`: as many drafts as pay, and the target's own text."""

import itertools
import random
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from decoding_helpers import learned, padded, write
from test_sampling_is_exact import SETTINGS, exact, p_value, sample
from transformers import LlamaForCausalLM

from fastdraft_hf.decode import length, speculative
from fastdraft_hf.decode.assisted import record_rounds
from fastdraft_hf.decode.length import LONGEST, DraftLength, Learned


@pytest.fixture
def fixed(monkeypatch: pytest.MonkeyPatch) -> Learned:
    """Give the loop known times, so that its lengths do not depend on the machine."""
    found = learned()
    monkeypatch.setattr(speculative, "draft_length", lambda *_: DraftLength(found))
    return found


def lengths(
    rule: DraftLength, accepts: Callable[[], bool], chance: float, rounds: int
) -> list[int]:
    """Return how many tokens a row drafts in every round; each is accepted by itself."""
    found = []
    for _ in range(rounds):
        if rule.looks_back:
            rule.looked_back([accepts() for _ in range(rule.idle)])
        rule.begin(1)
        drafted = accepted = 0
        while drafted < rule.most:
            rule.drafted([chance])
            accepted += accepted == drafted and accepts()
            drafted += 1
            if not rule.pays([True]):
                break
        rule.end(drafted, [(accepted + 1, drafted, False)], [[]])
        found.append(drafted)
    return found


def test_a_draft_that_pays_drafts_longer_and_one_that_does_not_drafts_seldom() -> None:
    rng = random.Random(0)
    found = {
        share: lengths(DraftLength(learned()), lambda s=share: rng.random() < s, share, 400)[40:]
        for share in (0.02, 0.5, 0.95)
    }
    assert sum(found[0.02]) < 0.05 * 360
    assert 1 < sum(found[0.5]) / 360 < 4
    assert 6 < sum(found[0.95]) / 360 <= max(found[0.95]) == LONGEST
    # A draft as slow as its target never pays, however good.
    assert sum(lengths(DraftLength(learned(1.0)), lambda: True, 0.95, 400)) < 0.1 * 400


def test_copies_are_as_long_as_they_pay() -> None:
    """A text whose copies are right copies long blocks; one whose copies are wrong, none."""
    found = {}
    for accepted in (True, False):
        rule = DraftLength(learned())
        lengths(rule, lambda: True, 0.5, 1)
        for _ in range(30):
            rule.begin(1)
            outcome = (1 + accepted * rule.copies, rule.copies, False)
            rule.end(rule.copies, [outcome], [[7] * rule.copies])
        rule.begin(1)
        found[accepted] = rule.copies
    assert found == {True: LONGEST, False: 0}
    assert DraftLength(learned()).copies == 0  # before anything is timed


def test_what_follows_a_copy_counts_as_drafted() -> None:
    """One row copies a token, drafts two more, and all are accepted; the other's are not."""
    pair = learned()
    rule, before = DraftLength(pair), pair.next.value
    rule.begin(2)
    for _ in range(3):
        rule.drafted([0.5, 0.5])
    rule.end(3, [(4, 3, False), (1, 3, False)], [[7], []])
    assert pair.next.value > before


def looks(rule: DraftLength, good: bool, rounds: int) -> list[int]:
    """Return the rounds before which the draft looked back."""
    found = []
    for number in range(rounds):
        if rule.looks_back:
            found.append(number)
        lengths(rule, lambda: good, 0.3, 1)
    return found


def test_it_looks_back_less_and_less_and_drafts_again_once_that_pays() -> None:
    rule = DraftLength(learned())
    off = looks(rule, False, 300)
    gaps = [b - a for a, b in itertools.pairwise(off)]
    assert gaps == sorted(gaps)
    assert max(gaps) == 64
    back = lengths(rule, lambda: True, 0.3, 64)
    first = next(number for number, drafted in enumerate(back) if drafted)
    assert all(back[first:])


def test_a_change_of_the_number_has_to_pay_for_itself() -> None:
    changes = []
    for cost in (0.0, 0.3):
        pair, rng, found = learned(), random.Random(0), list[int]()
        pair.target.change = cost
        rule = DraftLength(pair)
        for _ in range(400):
            chance = rng.choice((0.9, 0.6))
            found += lengths(rule, lambda c=chance, r=rng: r.random() < c, chance, 1)
        assert 2 <= sum(found) / len(found) < 6
        changes.append(sum(a != b for a, b in itertools.pairwise(found)))
    assert 0 < changes[1] < 0.5 * changes[0]


def test_a_sure_token_is_followed_by_more_than_an_unsure_one() -> None:
    """The draft's probability says something about acceptance only where it did so before."""
    both, rng = [], random.Random(1)
    for tells in (True, False):
        rule = DraftLength(learned())
        for _ in range(400):
            for chance in (0.95, 0.15):
                share = chance if tells else 0.55
                lengths(rule, lambda s=share: rng.random() < s, chance, 1)
        both.append([lengths(rule, lambda: True, c, 1)[0] for c in (0.95, 0.15)])
    assert both[0][0] > both[0][1] + 1
    assert abs(both[1][0] - both[1][1]) <= 1


def test_a_text_may_be_easier_than_the_drafts_probability_says() -> None:
    pair, rng = learned(), random.Random(2)
    lengths(DraftLength(pair), lambda: rng.random() < 0.3, 0.3, 300)
    rule = DraftLength(pair)
    before = lengths(rule, lambda: True, 0.3, 1)
    assert lengths(rule, lambda: True, 0.3, 30)[-1] > before[0] + 3


def test_times_are_measured_and_an_interruption_counts_little() -> None:
    seconds, rng = length._Seconds(), random.Random(0)
    for number in range(200):
        n = rng.randrange(5)
        first = number < 5 or number % 40 == 0  # a compilation, or something else on the machine
        seconds.add(n, (20 if first else 1) * (10 + 2 * n) * rng.uniform(0.95, 1.05))
    for n in (0, 4, 8):
        assert seconds(n) == pytest.approx(10 + 2 * n, rel=0.15)


def test_times_stay_above_zero_where_the_machine_becomes_faster() -> None:
    seconds = length._Seconds()
    for time, changed in [(1.0, False)] * 40 + [(3.0, True)] * 40 + [(0.001, True)] * 80:
        seconds.add(1, time, changed)
        if seconds.weight:
            assert min(map(seconds, range(LONGEST + 1))) > 0


@pytest.mark.parametrize("cost", [0.0, 6.0])
def test_what_another_shape_costs_is_told_apart(cost: float) -> None:
    seconds, rng, last = length._Seconds(), random.Random(0), 0
    for _ in range(300):
        n = last if rng.random() < 0.5 else rng.randrange(5)
        seconds.add(n, (20 + 2 * n + cost * (n != last)) * rng.uniform(0.95, 1.05), n != last)
        last = n
    assert seconds.change == pytest.approx(cost, abs=0.7)
    for n in (0, 4):
        assert seconds(n) == pytest.approx(20 + 2 * n, rel=0.05)


@pytest.mark.parametrize("measured", [True, False])
@pytest.mark.parametrize("copies", [0, 1])
@pytest.mark.parametrize("padding", [0, 3])
def test_greedy_text_is_the_targets(
    request: pytest.FixtureRequest,
    target: LlamaForCausalLM,
    neighbour: LlamaForCausalLM,
    stranger: LlamaForCausalLM,
    measured: bool,
    copies: int,
    padding: int,
) -> None:
    """Also where drafting starts late, stops and comes back, alone and in a padded batch."""
    if not measured:
        request.getfixturevalue("fixed")
    prompts = [[40, 41, 42, 50], [70, 33], [5, 6, 7, 8, 9, 10]]
    for texts in (prompts[:1], prompts):
        ids, _ = padded([[0] * padding + text for text in texts])
        given = {"attention_mask": (ids != 0).long(), "max_new_tokens": 60}
        alone = write(target, ids, **given)
        for draft in (neighbour, stranger):
            with record_rounds(target) as rounds:
                ours = write(target, ids, draft, "cost", copies, **given)
            assert torch.equal(ours, alone)
            if drafted := [d for d, _ in rounds if not measured and not copies]:
                assert len(set(drafted)) > 2
                assert (drafted.count(0) > len(drafted) / 2) == (draft is stranger)


@pytest.mark.parametrize(("positions", "sampling"), [(512, False), (512, True), (24, False)])
def test_what_the_target_wrote_alone_is_judged_as_if_it_had_been_drafted(
    monkeypatch: pytest.MonkeyPatch,
    target: LlamaForCausalLM,
    neighbour: LlamaForCausalLM,
    positions: int,
    sampling: bool,
) -> None:
    """A draft ten times as slow as its target never drafts; it looks back after 8, 16 and 32.

    Beyond its last position it could not read the text.
    """
    monkeypatch.setattr(neighbour.config, "max_position_embeddings", positions)
    judged: list[float] = []

    class Noting(DraftLength):
        def looked_back(self, accepted: Iterable[float]) -> None:
            judged.extend(accepted)
            super().looked_back(accepted)

    slow = learned(10.0)
    monkeypatch.setattr(speculative, "draft_length", lambda *_: Noting(slow))
    given = {"do_sample": sampling, "temperature": 0.7, "top_k": 0, "eos_token_id": -1}
    text = write(target, [[40, 41, 42, 50]], neighbour, "cost", max_new_tokens=60, **given)
    p, q = (model(text).logits[0, 3:-1] for model in (target, neighbour))
    own = text[0, 4:]
    if sampling:
        p, q = (logits.div(0.7).softmax(-1).gather(1, own[:, None])[:, 0] for logits in (p, q))
        expected = (q / p).clamp(max=1)
    else:
        expected = (q.argmax(-1) == own).float()
    looked_at = [*range(8), *range(8, 24), *range(40, 56)][: 8 if positions == 24 else None]
    assert judged == pytest.approx(expected[looked_at].tolist(), abs=1e-4)
    assert 0 < sum(judged) < len(judged)


@pytest.mark.parametrize(
    ("name", "runs", "copies"),
    [("temperature", 10_000, 0), ("processor", 1_000, 0), ("temperature", 10_000, 1)],
)
def test_batches_of_samples(
    pair: tuple[LlamaForCausalLM, LlamaForCausalLM],
    fixed: Learned,
    name: str,
    runs: int,
    copies: int,
) -> None:
    target, draft = pair
    with record_rounds(target) as rounds:
        given: dict[str, Any] = {"gamma": "cost", "copies": copies, "runs": runs}
        found = sample(target, draft, SETTINGS[name], rows=500, **given)
    assert len({drafted for drafted, _ in rounds}) > 1
    assert p_value(found, exact(target, SETTINGS[name])) > 1e-3
