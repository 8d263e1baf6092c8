"""The teacher-forced estimator against decoding itself, written out over every possible outcome."""

from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaForCausalLM

from fastdraft_hf.decode.assisted import record_decoding
from fastdraft_hf.decode.settings import TEMPERATURE_RATIO
from fastdraft_hf.decode.speculative import assisted_decoding
from fastdraft_hf.eval.expected import (
    Continuation,
    ExpectedRounds,
    TextAcceptance,
    add_rounds,
    expected_rounds,
    fit_temperature_ratio,
    text_acceptance,
)
from fastdraft_hf.eval.metrics import acceptance_rate

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
        parts.append(ExpectedRounds(*(chance * count for count in found)))
    return add_rounds(parts)


def decoded(p: Chain, q: Chain, ends: set[int], gamma: int) -> ExpectedRounds:
    """The mean of real decoding: every draft, every coin and every correction, by its chance."""
    totals = dict.fromkeys(ExpectedRounds._fields, 0.0)

    def block(last: int, limit: int, chosen: tuple[int, ...] = ()) -> Iterator[tuple[float, tuple]]:
        if len(chosen) == limit or (chosen and chosen[-1] in ends):
            yield 1.0, chosen
            return
        for token, chance in enumerate(q[last]):
            for rest, whole in block(token, limit, (*chosen, token)):
                yield chance * rest, whole

    def play(text: tuple[int, ...], weight: float) -> None:
        if len(text) == LONGEST or (text and text[-1] in ends):
            totals["new_tokens"] += weight * len(text)
            return
        totals["target_passes"] += weight
        last = text[-1] if text else 1
        for chance, tokens in block(last, min(gamma, LONGEST - len(text) - 1)):
            totals["drafted"] += weight * chance * len(tokens)
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
                totals["accepted"] += so_far
                before, kept = token, place + 1
            if so_far:
                for v in range(3):
                    play((*text, *tokens[:kept], v), so_far * p[before][v])

    play((), 1.0)
    return ExpectedRounds(**totals)


@given(CHAINS, CHAINS, st.integers(1, 4), st.sampled_from([set[int](), {0}]))
def test_it_is_what_decoding_counts(p: Chain, q: Chain, gamma: int, ends: set[int]) -> None:
    found, true = teacher_forced(p, q, ends, gamma), decoded(p, q, ends, gamma)
    assert found._replace(drafted=0) == pytest.approx(true._replace(drafted=0))
    # What a draft writes after a rejected token is not in any text.
    if gamma < 3 or not ends:
        assert found.drafted == pytest.approx(true.drafted)
    assert found.drafted >= true.drafted - 1e-9


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


TEXTS = [Continuation("t", (1, 2, 3), tuple(range(4, 30))), Continuation("t", (5,), (6, 7, 8))]


def sharp_and_flat(tiny_model: Callable[..., LlamaForCausalLM]) -> list[LlamaForCausalLM]:
    """A draft whose logits are 0.7 times the target's is the target at ratio 0.7."""
    models = [tiny_model(seed=0), tiny_model(seed=0)]
    with torch.no_grad():
        for model, scale in zip(models, (5, 3.5), strict=True):
            model.model.norm.weight.mul_(scale)
    return models


def test_the_best_ratio_undoes_a_flatter_draft(tiny_model: Callable[..., LlamaForCausalLM]) -> None:
    target, draft = sharp_and_flat(tiny_model)
    found = fit_temperature_ratio(target, draft, TEXTS, 0.8)
    assert found["temperature_ratio"] == 0.7
    assert found["acceptance"] == pytest.approx(1, abs=1e-5)
    assert found["tokens"] == 29
    for name, ratio in (("acceptance", 0.7), ("acceptance_at_1", 1.0)):
        read = [text_acceptance(target, draft, text, 0.8, (), ratio) for text in TEXTS]
        alphas = [alpha for one in read for alpha in one.alphas]
        assert found[name] == pytest.approx(sum(alphas) / 29, abs=1e-5)


def test_the_loop_drafts_at_the_ratio(tiny_model: Callable[..., LlamaForCausalLM]) -> None:
    """Where the ratio makes both distributions equal, every drafted token is accepted."""
    target, draft = sharp_and_flat(tiny_model)
    draft.generation_config.num_assistant_tokens = 4
    shares = []
    for ratio in (0.7, 1.0):
        torch.manual_seed(0)
        setattr(draft.generation_config, TEMPERATURE_RATIO, ratio)
        with record_decoding(target) as records:
            target.generate(
                torch.tensor([[1, 2, 3]]),
                do_sample=True,
                max_new_tokens=60,
                assistant_model=draft,
                custom_generate=assisted_decoding,
            )
        shares.append(acceptance_rate(records))
    assert shares[0] > 0.999
    assert shares[1] < 0.95
