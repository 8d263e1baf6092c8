"""The modules for `evaluate`: they load offline, and count what the package's formulas count."""

import doctest
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fastdraft_hf
from fastdraft_hf.decode.records import DecodingRecord
from fastdraft_hf.eval import metrics
from fastdraft_hf.eval.modules import METRICS, metric_path

evaluate = pytest.importorskip("evaluate", exc_type=ImportError)
pytestmark = pytest.mark.usefixtures("evaluate_cache")

MakeRecord = Callable[..., DecodingRecord]

ROUND = st.integers(0, 5).flatmap(lambda d: st.tuples(st.just(d), st.integers(0, d)))
ANSWERS = st.lists(st.lists(ROUND, max_size=8), min_size=1, max_size=6)


@pytest.fixture(scope="module")
def modules(evaluate_cache: None) -> dict[str, Any]:
    return {name: evaluate.load(metric_path(name)) for name in METRICS}


def totals(records: list[DecodingRecord]) -> dict[str, list[int]]:
    return {
        "drafted": [r.drafted for r in records],
        "accepted": [r.accepted for r in records],
        "new_tokens": [len(r.tokens) for r in records],
        "target_passes": [r.target_passes for r in records],
    }


@given(ANSWERS, st.floats(0, 1), st.integers(0, 99))
@settings(max_examples=20)
def test_modules_equal_the_packages_formulas_and_intervals(
    modules: dict[str, Any],
    make_record: MakeRecord,
    answers: list[list[tuple[int, int]]],
    cost: float,
    seed: int,
) -> None:
    records = [make_record(rounds) for rounds in answers]
    sampling = {"confidence_level": 0.95, "n_resamples": 40, "seed": seed}
    given_ = totals(records)

    def speed_up(drawn: Any) -> float:
        return metrics.mbsu(metrics.block_efficiency(drawn), cost, 5)

    expected = {
        "acceptance_rate": metrics.acceptance_rate,
        "block_efficiency": metrics.block_efficiency,
        "mbsu": speed_up,
    }
    for name, formula in expected.items():
        extra = {"cost_ratio": cost, "num_assistant_tokens": 5} if name == "mbsu" else {}
        estimate = metrics.bootstrap(records, formula, samples=40, seed=seed)
        assert modules[name].compute(**given_, **sampling, **extra) == pytest.approx(
            {name: estimate.value, f"{name}_low": estimate.low, f"{name}_high": estimate.high}
        )


GOOD = {"drafted": [3, 3], "accepted": [1, 3]}
EMITTED = {"new_tokens": [2, 4], "target_passes": [1, 1]}


@pytest.mark.parametrize(
    ("name", "given_", "message"),
    [
        ("acceptance_rate", {"drafted": [3], "accepted": [4]}, "answer 0: 3 .* 4 accepted"),
        ("acceptance_rate", {"drafted": [3, 3], "accepted": [1]}, "Mismatch in the number"),
        ("acceptance_rate", {"drafted": [], "accepted": []}, "at least one answer"),
        ("acceptance_rate", {**GOOD, "confidence_level": 95}, "between 0 and 1"),
        ("mbsu", {**EMITTED, "gamma": 3}, "takes no gamma"),
        ("block_efficiency", {"new_tokens": [2, 1], "target_passes": [1, 0]}, "without a pass"),
        ("mbsu", EMITTED, "needs cost_ratio"),
        ("mbsu", {**EMITTED, "cost_ratio": -1, "num_assistant_tokens": 3}, "at least 0; got -1"),
        ("mbsu", {**EMITTED, "cost_ratio": 0.1, "num_assistant_tokens": 2}, "answer 1: .* than γ"),
    ],
)
def test_impossible_input_is_refused_and_forgotten(
    modules: dict[str, Any], name: str, given_: dict[str, Any], message: str
) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        modules[name].compute(**given_)
    # What was refused must not be counted with what comes next.
    if name == "acceptance_rate":
        assert modules[name].compute(**GOOD) == {"acceptance_rate": 4 / 6}
    if name == "block_efficiency":
        assert modules[name].compute(**EMITTED) == {"block_efficiency": 3.0}


def test_unknown_names_and_configurations_are_errors() -> None:
    with pytest.raises(fastdraft_hf.FastDraftError, match="did you mean 'mbsu'"):
        metric_path("mbsus")
    for name in METRICS:
        with pytest.raises(ValueError, match="configuration"):
            evaluate.load(metric_path(name), "round")


@pytest.mark.parametrize("name", METRICS)
def test_the_examples_are_true(modules: dict[str, Any], name: str) -> None:
    assert "Args" in modules[name].inputs_description or "compute" in modules[name].description
    scope = {"evaluate": evaluate, "fastdraft_hf": fastdraft_hf}
    text = modules[name].description
    examples = doctest.DocTestParser().get_doctest(text, scope, name, None, 0)
    assert examples.examples
    assert doctest.DocTestRunner(verbose=False).run(examples).failed == 0
