"""What the timings say: every figure is checked against times that were chosen."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastdraft_hf.decode.records import DecodingRecord
from fastdraft_hf.eval import bench, metrics, speed
from fastdraft_hf.eval.bench import Setting
from fastdraft_hf.eval.config import BenchConfig
from fastdraft_hf.eval.journal import Journal
from fastdraft_hf.eval.prompts import EvaluationPrompt
from fastdraft_hf.eval.speed import judge, paired_ratio

PROMPTS = [
    EvaluationPrompt("humaneval", "H/0", (1,)),
    EvaluationPrompt("humaneval", "H/1", (2,)),
    EvaluationPrompt("ifbench", "7", (3,)),
]
NOISE = {"H/0": 1.0, "H/1": 1.1, "7": 0.9}
CONFIG = BenchConfig(num_assistant_tokens=[1, 2, 4])


def record(key: str, seconds: float, task: str = "t", **given: Any) -> DecodingRecord:
    fields = {"tokens": [1, 2, 3, 4], "target_passes": 4, **given}
    return DecodingRecord("p", task, key, 0.0, 0, seconds=seconds, **fields)


def pairs(ratios: dict[str, float]) -> list[speed.Pair]:
    return [(record(key, 1 / ratio), record(key, 1.0)) for key, ratio in ratios.items()]


def timings(
    folder: Path,
    paths: list[str],
    tokens_per_second: Callable[[Setting], float],
    config: BenchConfig = CONFIG,
) -> dict[str, Any]:
    """Summarize a benchmark at chosen speeds; a prompt's noise is on all settings that draft."""
    journal = Journal(folder / "records.jsonl")
    assisted = bench.assisted_settings(paths, config.num_assistant_tokens)

    def decode(setting: Setting, prompt: EvaluationPrompt, longest: int) -> DecodingRecord:
        gamma = setting.num_assistant_tokens
        noise = NOISE[prompt.key] if gamma else 1.0
        return DecodingRecord(
            path=setting.path,
            task=prompt.task,
            key=prompt.key,
            temperature=0.0,
            num_assistant_tokens=gamma,
            tokens=[1, 2, 3, 4],
            seconds=4 / (tokens_per_second(setting) * noise),
            target_passes=2 if gamma else 4,
            drafted=2 * gamma,
            accepted=2 if gamma else 0,
            first_token_seconds=0.02 if gamma else 0.01,
        )

    settings = bench.all_settings(assisted)
    bench.collect("x", decode, settings, PROMPTS, config, journal)
    timed = bench.complete_records(journal, settings, PROMPTS)
    return speed.summarize(timed, assisted)


def by_gamma(speeds: dict[int, float]) -> Callable[[Setting], float]:
    return lambda setting: speeds[setting.num_assistant_tokens]


def test_a_ratio_is_of_sums_over_pairs() -> None:
    found = paired_ratio(pairs({"a": 2.0, "b": 1.0}))
    assert found.value == pytest.approx(2 / 1.5)
    assert (found.low, found.high) == pytest.approx((1.0, 2.0))
    with pytest.raises(ValueError, match="same prompt"):
        paired_ratio([(record("a", 1), record("b", 1))])
    # Half the time on every prompt, whatever its own speed, is an interval of no width.
    found = paired_ratio([(record(str(s), s / 2), record(str(s), s)) for s in (1.0, 8.0, 32.0)])
    assert (found.value, found.low, found.high) == pytest.approx((2, 2, 2))


def test_a_prompt_has_no_say_in_how_it_is_judged() -> None:
    """γ = 2 leads by prompt a alone, so a is always judged at γ = 1, which is best elsewhere."""
    candidates = {
        Setting("ours", 1): pairs({"a": 1.0, "b": 1.2}),
        Setting("ours", 2): pairs({"a": 5.0, "b": 1.1}),
    }
    found = judge(candidates)
    assert found.best == Setting("ours", 2)
    # Two halvings: chosen on a (γ = 2) and judged on b, chosen on b (γ = 1) and judged on a.
    assert found.ratio.value == pytest.approx(2 / (1 / 1.0 + 1 / 1.1))
    assert found.ratio.value < paired_ratio(candidates[found.best]).value


@pytest.mark.parametrize(
    ("count", "left_out"),
    # Φ(-t sqrt(n / (n - 1))) with t of a table of Student's distribution at 97.5%.
    [(4, 0.00012), (8, 0.00573), (16, 0.01386), (100, 0.02307)],
)
def test_an_interval_is_as_wide_as_its_number_of_prompts_asks(count: int, left_out: float) -> None:
    assert metrics._tail(count) == pytest.approx(left_out, rel=0.08, abs=1e-4)
    assert metrics._tail(2) < 1e-6
    assert metrics._tail(1) == 0.0


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (12.0, True),  # 1.08 to 1.32 times the target alone
        (10.0, False),  # 0.9 to 1.1: the value may lie above 1, the interval does not
    ],
)
def test_a_speed_up_has_its_whole_interval_above_one(
    tmp_path: Path, value: float, expected: bool
) -> None:
    results = timings(tmp_path, ["openvino"], by_gamma({0: 10, 1: value, 2: 1, 4: 1}))
    overall = results["paths"]["openvino"]["overall"]
    value, low, high = overall["judged"]["ratio"]
    assert low < value < high
    assert (low > 1) is overall["is_speed_up"] is results["best"]["is_speed_up"] is expected
    # A single pair has no spread at all, whatever it says.
    assert judge({Setting("ours", 1): pairs({"a": 1.5, "b": 1.5})}).is_speed_up
    assert not judge({Setting("ours", 1): pairs({"a": 1.5})}).is_speed_up


def test_a_speed_up_is_over_the_same_kernels(tmp_path: Path) -> None:
    """What our loop brings without a draft is a line of its own."""

    def at(setting: Setting) -> float:
        if setting.path == "alone":
            return 10.0
        return {0: 12.0, 1: 14.0, 2: 18.0, 4: 15.0}[setting.num_assistant_tokens]

    results = timings(tmp_path, ["ours"], at)
    overall = results["paths"]["ours"]["overall"]
    assert overall["alone_tokens_per_second"] == pytest.approx(12)
    assert overall["stock"]["tokens_per_second"] == pytest.approx(10)
    assert overall["stock"]["kernels_ratio"] == pytest.approx([1.2, 1.2, 1.2])
    ratio = overall["sweep"]["2"]["ratio"]
    # At equal speed of all prompts 18/12; here the prompts' noise is on the drafting side.
    assert ratio[0] == pytest.approx(1.5 * 3 / (1 / 1.0 + 1 / 1.1 + 1 / 0.9))
    assert results["best"]["judged"]["ratio"] == overall["judged"]["ratio"]
    assert results["best"]["fastest_alone"] == {
        "engine": "ours",
        "tokens_per_second": pytest.approx(12),
    }


def test_paths_are_compared_on_the_prompts_that_all_of_them_have() -> None:
    """PyTorch had time for an easy prompt alone, on which OpenVINO is faster."""

    def both(easy: float, hard: float) -> list[DecodingRecord]:
        return [record("easy", easy), record("hard", hard)]

    timed = {
        Setting("openvino-alone"): both(1.0, 12.0),
        Setting("openvino", 2): both(0.8, 8.0),
        Setting("alone"): [record("easy", 2.0)],
        Setting("transformers", 2): [record("easy", 0.9)],
    }
    results = speed.summarize(timed, [Setting("transformers", 2), Setting("openvino", 2)])
    counts = {path: found["overall"]["prompts"] for path, found in results["paths"].items()}
    assert counts == {"transformers": 1, "openvino": 2}
    best = results["best"]
    assert (best["path"], best["tokens_per_second"]) == ("openvino", pytest.approx(4 / 0.8))
    assert best["judged"]["ratio"].value == pytest.approx(13 / 8.8)
    assert best["fastest_alone"] == {
        "engine": "openvino-alone",
        "tokens_per_second": pytest.approx(4),
    }


def test_the_best_of_all_paths(tmp_path: Path) -> None:
    speeds = {"alone": 10.0, "openvino-alone": 50.0, "transformers": 12.0, "ours": 16.0}

    def at(setting: Setting) -> float:
        base = speeds.get(setting.path, 40.0)
        return base + (setting.num_assistant_tokens == 2)

    paths = ["transformers", "ours", "openvino"]
    results = timings(tmp_path, paths, at)
    assert list(results["paths"]) == paths
    best = results["best"]
    assert (best["path"], best["num_assistant_tokens"]) == ("openvino", 2)
    assert best["is_speed_up"] is False
    assert best["fastest_alone"] == {
        "engine": "openvino-alone",
        "tokens_per_second": pytest.approx(50),
    }
