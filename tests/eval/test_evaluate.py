from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaForCausalLM

from fastdraft_hf._ties import Margin
from fastdraft_hf.decode.records import DecodingRecord
from fastdraft_hf.eval import evaluate
from fastdraft_hf.eval.config import EvaluateConfig
from fastdraft_hf.eval.evaluate import ALONE, GREEDY, SAMPLED, UNTRAINED, Setting
from fastdraft_hf.eval.journal import Journal
from fastdraft_hf.eval.metrics import acceptance_rate, block_efficiency
from fastdraft_hf.eval.prompts import EvaluationPrompt

PROMPTS = [
    EvaluationPrompt("humaneval", "H/0", (40, 41, 42)),
    EvaluationPrompt("humaneval", "H/1", (50, 60, 70, 80)),
    EvaluationPrompt("ifbench", "7", (90, 33)),
    EvaluationPrompt("ifbench", "8", (20, 21, 22)),
]
CONFIG = EvaluateConfig(max_new_tokens=6, num_assistant_tokens=2, untrained_prompts_per_task=1)
WAYS = {
    ALONE: Setting(ALONE),
    GREEDY: Setting(GREEDY, 2),
    SAMPLED: Setting(SAMPLED, 2, 0.6),
    UNTRAINED: Setting(UNTRAINED, 2, 0.6),
}
# Three runs of each prompt, and one more of each task's first.
RUNS = 3 * len(PROMPTS) + 2


def label(run: str, prompt: EvaluationPrompt) -> str:
    return WAYS[run].label(prompt)


@pytest.fixture(scope="module")
def models(tiny_model: Callable[..., LlamaForCausalLM]) -> tuple[LlamaForCausalLM, ...]:
    return tiny_model(seed=0), tiny_model(seed=1, num_hidden_layers=1), tiny_model(seed=2)


@pytest.fixture
def collect(
    models: tuple[LlamaForCausalLM, ...], monkeypatch: pytest.MonkeyPatch
) -> Callable[[Journal], list[tuple[str, str]]]:
    """Collect into a journal; return (task, key) of every decoding made, the warm-up included."""

    def run(journal: Journal) -> list[tuple[str, str]]:
        made = []
        decode = evaluate.decode

        def counted(*args: Any, **kwargs: Any) -> DecodingRecord:
            made.append((kwargs["task"], kwargs["key"]))
            return decode(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(evaluate, "decode", counted)
            evaluate.collect(*models, PROMPTS, CONFIG, journal, seed=3)
        return made

    return run


def test_every_run_of_every_prompt_is_kept(
    collect: Callable[[Journal], list[tuple[str, str]]], tmp_path: Path
) -> None:
    journal = Journal(tmp_path / "records.jsonl")
    made = collect(journal)
    wanted = {label(run, p) for run, p in itertools.product((ALONE, GREEDY, SAMPLED), PROMPTS)}
    wanted |= {label(UNTRAINED, PROMPTS[0]), label(UNTRAINED, PROMPTS[2])}
    assert {name for name, _ in journal.items()} == wanted
    assert [place for place in made if place[0] != "warm-up"] == [
        (r.task, r.key) for _, r in journal.items()
    ]
    for prompt in PROMPTS:
        alone, greedy = journal[label(ALONE, prompt)], journal[label(GREEDY, prompt)]
        assert (alone.num_assistant_tokens, alone.rounds) == (0, [])
        assert greedy.num_assistant_tokens == 2
        assert greedy.tokens == alone.tokens
        assert greedy.temperature == alone.temperature == 0.0
        assert journal[label(SAMPLED, prompt)].temperature == CONFIG.temperature
    # The same prompt alone and with the draft stand side by side in time.
    order = [name for name, _ in journal.items()]
    for prompt in PROMPTS:
        assert order.index(label(GREEDY, prompt)) == order.index(label(ALONE, prompt)) + 1


def test_a_killed_evaluation_decodes_only_what_is_missing(
    collect: Callable[[Journal], list[tuple[str, str]]], tmp_path: Path
) -> None:
    whole = Journal(tmp_path / "whole.jsonl")
    collect(whole)
    half = Journal(tmp_path / "half.jsonl")
    kept = list(whole.items())[: RUNS // 2]
    for name, record in kept:
        half.add(name, record)

    made = [place for place in collect(half) if place[0] != "warm-up"]
    assert len(made) == RUNS - len(kept)
    assert [(r.task, r.key) for _, r in list(whole.items())[RUNS // 2 :]] == made
    # The seed is the prompt's own, so a resumed run samples what a whole one does.
    assert {n: r.tokens for n, r in half.items()} == {n: r.tokens for n, r in whole.items()}
    assert collect(half) == []  # not even a warm-up


def test_without_an_untrained_draft_its_runs_are_left_out(
    models: tuple[LlamaForCausalLM, ...], tmp_path: Path
) -> None:
    journal = Journal(tmp_path / "records.jsonl")
    target, draft, _ = models
    evaluate.collect(target, draft, None, PROMPTS[:1], CONFIG, journal, seed=0)
    assert [name.split("/")[0] for name, _ in journal.items()] == [ALONE, GREEDY, SAMPLED]


def greedy_pair(
    make_record: Callable[..., DecodingRecord], path: Path, alone: list[int], assisted: list[int]
) -> Journal:
    journal = Journal(path)
    journal.add(label(ALONE, PROMPTS[0]), make_record(tokens=alone, target_passes=len(alone)))
    journal.add(label(GREEDY, PROMPTS[0]), make_record(tokens=assisted, target_passes=1))
    return journal


def test_a_planted_difference_is_found_with_the_targets_margin(
    models: tuple[LlamaForCausalLM, ...],
    make_record: Callable[..., DecodingRecord],
    tmp_path: Path,
) -> None:
    target = models[0]
    path = tmp_path / "records.jsonl"
    journal = greedy_pair(make_record, path, [5, 6, 7, 8], [5, 6, 9, 8])
    (found,) = evaluate.compare_greedy(target, PROMPTS[:1], CONFIG, journal)
    assert (found["task"], found["key"], found["place"]) == ("humaneval", "H/0", 2)
    with torch.no_grad():
        logits = target(input_ids=torch.tensor([[*PROMPTS[0].ids, 5, 6]])).logits[0, -1]
    first, second = logits.topk(2).values.tolist()
    assert found["margin"] == pytest.approx(first - second, abs=1e-4)
    assert found["tie"] is False


def test_a_difference_at_a_tie_is_called_one(
    tiny_model: Callable[..., LlamaForCausalLM],
    make_record: Callable[..., DecodingRecord],
    tmp_path: Path,
) -> None:
    target = tiny_model(seed=0)
    with torch.no_grad():  # all logits zero: every token is as good as every other
        target.get_output_embeddings().weight.zero_()
    journal = greedy_pair(make_record, tmp_path / "records.jsonl", [5, 6], [5, 7])
    (found,) = evaluate.compare_greedy(target, PROMPTS[:1], CONFIG, journal)
    assert (found["place"], found["margin"], found["tie"]) == (1, 0.0, True)


def test_an_answer_cut_short_is_a_fault(
    models: tuple[LlamaForCausalLM, ...],
    make_record: Callable[..., DecodingRecord],
    tmp_path: Path,
) -> None:
    journal = greedy_pair(make_record, tmp_path / "records.jsonl", [5, 6, 7], [5, 6])
    (found,) = evaluate.compare_greedy(models[0], PROMPTS[:1], CONFIG, journal)
    assert (found["place"], found["tie"]) == (None, False)


def test_equal_answers_are_no_difference(
    models: tuple[LlamaForCausalLM, ...],
    make_record: Callable[..., DecodingRecord],
    tmp_path: Path,
) -> None:
    journal = greedy_pair(make_record, tmp_path / "records.jsonl", [5, 6, 7], [5, 6, 7])
    assert evaluate.compare_greedy(models[0], PROMPTS[:1], CONFIG, journal) == []


def test_the_summary_has_every_figure_of_every_task(
    collect: Callable[[Journal], list[tuple[str, str]]], tmp_path: Path
) -> None:
    journal = Journal(tmp_path / "records.jsonl")
    collect(journal)
    differences = [{"task": "ifbench", "key": "8", "place": 0, "margin": 0.0, "tie": True}]
    result = evaluate.summarize(
        PROMPTS,
        journal,
        CONFIG,
        target_parameters=1000,
        draft_parameters=250,
        differences=differences,
    )
    assert result["cost_ratio"] == 0.25
    assert (result["greedy_prompts"], result["greedy_identical"]) == (4, 3)
    assert result["greedy_differences"] == differences
    assert list(result["tasks"]) == ["humaneval", "ifbench"]
    for figures, prompts in (
        (result["tasks"]["humaneval"], PROMPTS[:2]),
        (result["tasks"]["ifbench"], PROMPTS[2:]),
        (result["overall"], PROMPTS),
    ):
        for run in (SAMPLED, GREEDY):
            records = [journal[label(run, p)] for p in prompts]
            assert figures[run]["prompts"] == len(prompts)
            assert figures[run]["drafted"] == sum(r.drafted for r in records)
            assert figures[run]["acceptance_rate"][0] == acceptance_rate(records)
            efficiency = figures[run]["block_efficiency"]
            assert efficiency[0] == block_efficiency(records)
            assert efficiency[1] <= efficiency[0] <= efficiency[2] <= 3
            # γ = 2 and c = 1/4: a round costs one and a half passes.
            assert figures[run]["mbsu"] == pytest.approx([v / 1.5 for v in efficiency])
        wall = figures["greedy_wall_clock"]
        assert wall["ratio"][0] == pytest.approx(
            wall["assisted_tokens_per_second"] / wall["alone_tokens_per_second"]
        )
    assert result["tasks"]["ifbench"][UNTRAINED]["prompts"] == 1
    assert result["overall"][UNTRAINED]["prompts"] == 2


SEVERAL = EvaluateConfig(
    max_new_tokens=6,
    num_assistant_tokens=[2, 4],
    temperature=[0.0, 5.0, 9.0],
    untrained_prompts_per_task=0,
)


@pytest.fixture(scope="module")
def several(
    models: tuple[LlamaForCausalLM, ...], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Journal, dict[str, Any]]:
    target, draft, _ = models
    journal = Journal(tmp_path_factory.mktemp("several") / "records.jsonl")
    evaluate.collect(target, draft, None, PROMPTS, SEVERAL, journal, seed=3)
    differences = evaluate.compare_greedy(target, PROMPTS, SEVERAL, journal)
    result = evaluate.summarize(
        PROMPTS,
        journal,
        SEVERAL,
        target_parameters=1000,
        draft_parameters=250,
        differences=differences,
        readings=evaluate.read_texts(target, draft, PROMPTS, SEVERAL, journal, {2}),
    )
    return journal, json.loads(json.dumps(result))


def test_every_temperature_meets_every_length(several: tuple[Journal, dict[str, Any]]) -> None:
    journal, result = several
    # Alone once, greedy at both γ because 0 was asked for, two temperatures at both γ.
    assert len(journal) == len(PROMPTS) * (1 + 2 + 4)
    found = [(s["num_assistant_tokens"], s["temperature"]) for s in result["settings"]]
    assert found == [(2, 5.0), (4, 5.0), (2, 9.0), (4, 9.0), (2, 0.0), (4, 0.0)]
    for setting in result["settings"]:
        gamma, temperature = setting["num_assistant_tokens"], setting["temperature"]
        run = Setting(SAMPLED if temperature else GREEDY, gamma, temperature)
        for figures, prompts in (
            (setting["tasks"]["humaneval"], PROMPTS[:2]),
            (setting["tasks"]["ifbench"], PROMPTS[2:]),
            (setting["overall"], PROMPTS),
        ):
            records = [journal[run.label(p)] for p in prompts]
            assert {r.temperature for r in records} == {temperature}
            assert {r.num_assistant_tokens for r in records} == {gamma}
            assert figures["acceptance_rate"][0] == acceptance_rate(records)
            assert figures["mbsu"][0] == pytest.approx(
                block_efficiency(records) / (0.25 * gamma + 1)
            )
    assert (result["greedy_prompts"], result["greedy_identical"]) == (4, 4)


def test_single_figures_are_those_of_the_first(several: tuple[Journal, dict[str, Any]]) -> None:
    result = several[1]
    assert (result["num_assistant_tokens"], result["temperature"]) == (2, 5.0)
    first, greedy = result["settings"][0], result["settings"][4]
    assert result["overall"][SAMPLED] == first["overall"]
    assert result["overall"][GREEDY] == greedy["overall"]
    for task in ("humaneval", "ifbench"):
        assert result["tasks"][task][SAMPLED] == first["tasks"][task]
        assert UNTRAINED not in result["tasks"][task]


def test_sampled_figures_have_their_expectation(several: tuple[Journal, dict[str, Any]]) -> None:
    for setting in several[1]["settings"]:
        figures = setting["overall"]
        if not setting["temperature"]:
            assert "expected" not in figures
            continue
        expected = figures["expected"]
        assert expected["texts"] == 2 * len(PROMPTS)  # those of both γ
        value, low, high = expected["acceptance_rate"]
        assert 0 <= low <= value <= high <= 1
        assert len(expected["acceptance_by_position"]) == setting["num_assistant_tokens"]
        assert 1 <= expected["block_efficiency"][0] <= setting["num_assistant_tokens"] + 1
        decoded = figures["acceptance_rate"]
        assert figures["intervals_overlap"] == (low <= decoded[2] and decoded[1] <= high)


def test_a_faulty_length_is_named_before_a_tie(
    models: tuple[LlamaForCausalLM, ...],
    make_record: Callable[..., DecodingRecord],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One entry a prompt, however many γ differ: the sentence of the report counts prompts."""
    journal = Journal(tmp_path / "records.jsonl")
    for setting, tokens in (
        (Setting(ALONE), [5, 6, 7]),
        (Setting(GREEDY, 2), [5, 9, 7]),
        (Setting(GREEDY, 4), [5, 6, 9]),
    ):
        journal.add(setting.label(PROMPTS[0]), make_record(tokens=tokens, target_passes=1))
    margins = {(*PROMPTS[0].ids, 5): Margin(0.0, 9.0), (*PROMPTS[0].ids, 5, 6): Margin(3.0, 9.0)}
    monkeypatch.setattr(evaluate, "greedy_margin", lambda target, ids: margins[tuple(ids)])
    (found,) = evaluate.compare_greedy(models[0], PROMPTS[:1], SEVERAL, journal)
    assert (found["num_assistant_tokens"], found["place"], found["tie"]) == (4, 2, False)


@given(
    st.lists(st.integers(1, 12), min_size=1, unique=True),
    st.lists(st.floats(0, 4), min_size=1, unique=True).filter(any),
)
def test_settings_are_the_products_and_their_labels_differ(
    gammas: list[int], temperatures: list[float]
) -> None:
    config = EvaluateConfig(num_assistant_tokens=gammas, temperature=temperatures)
    settings = evaluate.settings_of(config)
    sampled = [t for t in temperatures if t > 0]
    greedy = len(gammas) if 0 in temperatures else 1
    assert len(settings) == len(sampled) * len(gammas) + greedy
    assert settings[0] == Setting(SAMPLED, gammas[0], sampled[0])
    assert len({s.label(PROMPTS[0]) for s in settings}) == len(settings)
