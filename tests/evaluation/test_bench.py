from __future__ import annotations

from pathlib import Path

import pytest

from fastdraft_hf.decoding.records import DecodingRecord
from fastdraft_hf.evaluation import bench
from fastdraft_hf.evaluation.config import BenchConfig
from fastdraft_hf.evaluation.journal import Journal
from fastdraft_hf.evaluation.prompts import EvaluationPrompt

PROMPTS = [
    EvaluationPrompt("humaneval", "H/0", (1,)),
    EvaluationPrompt("humaneval", "H/1", (2,)),
    EvaluationPrompt("ifbench", "7", (3,)),
]
CONFIG = BenchConfig(num_assistant_tokens=[1, 2, 4], repeats=2)


class FakeDecode:
    """Answers at a speed that is decided by γ; remembers what it was asked."""

    def __init__(self, speed: dict[int, float], other_answer: set[tuple[str, int]] = frozenset()):
        self.speed, self.other_answer = speed, other_answer
        self.calls: list[tuple[str, int]] = []

    def __call__(self, prompt: EvaluationPrompt, gamma: int) -> DecodingRecord:
        self.calls.append((prompt.key, gamma))
        tokens = [9, 9, 9, 9] if (prompt.key, gamma) in self.other_answer else [1, 2, 3, 4]
        # Every prompt has a speed of its own, so that an interval over prompts has a width.
        noise = {"H/0": 1.0, "H/1": 1.1, "7": 0.9}[prompt.key] if gamma else 1.0
        return DecodingRecord(
            path="openvino",
            task=prompt.task,
            key=prompt.key,
            temperature=0.0,
            num_assistant_tokens=gamma,
            tokens=tokens,
            seconds=4 / (self.speed[gamma] * noise),
            target_passes=2 if gamma else 4,
            drafted=2 * gamma,
            accepted=2 if gamma else 0,
        )


def run(folder: Path, decode: FakeDecode) -> Journal:
    folder.mkdir(exist_ok=True)
    journal = Journal(folder / "records.jsonl")
    bench.collect("openvino", decode, PROMPTS, CONFIG, journal)
    return journal


def test_settings_follow_one_another_on_every_prompt(tmp_path: Path) -> None:
    decode = FakeDecode({0: 10, 1: 12, 2: 15, 4: 9})
    journal = run(tmp_path, decode)
    one_round = [(p.key, gamma) for p in PROMPTS for gamma in (0, 1, 2, 4)]
    warm_up, timed = decode.calls[:2], decode.calls[2:]
    assert warm_up == [("H/0", 0), ("H/0", 4)]
    assert timed == one_round * CONFIG.repeats
    assert len(journal) == len(timed)


def test_a_killed_bench_times_only_what_is_missing(tmp_path: Path) -> None:
    decode = FakeDecode({0: 10, 1: 12, 2: 15, 4: 9})
    run(tmp_path, decode)
    path = tmp_path / "records.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    path.write_text("".join(lines[:10]), encoding="utf-8")
    again = FakeDecode(decode.speed)
    journal = run(tmp_path, again)
    assert again.calls[2:] == decode.calls[2:][10:]
    assert len(journal) == len(lines)
    finished = FakeDecode(decode.speed)
    run(tmp_path, finished)
    assert finished.calls == []


def test_two_paths_share_a_journal(tmp_path: Path) -> None:
    decode = FakeDecode({0: 10, 1: 12, 2: 15, 4: 9})
    journal = run(tmp_path, decode)
    bench.collect("transformers", decode, PROMPTS, CONFIG, journal)
    assert len(journal) == 2 * CONFIG.repeats * len(PROMPTS) * 4


def test_the_best_setting_is_the_fastest(tmp_path: Path) -> None:
    journal = run(tmp_path, FakeDecode({0: 10, 1: 12, 2: 15, 4: 9}))
    result = bench.summarize("openvino", PROMPTS, CONFIG, journal)
    overall = result["overall"]
    assert overall["best_num_assistant_tokens"] == 2
    assert overall["is_speed_up"] is True
    assert overall["alone_tokens_per_second"] == pytest.approx(10)
    assert list(overall["sweep"]) == ["1", "2", "4"]
    humaneval, ifbench = result["tasks"]["humaneval"], result["tasks"]["ifbench"]
    # One prompt at noise 0.9: the ratio is 1.5 * 0.9 without a width.
    assert ifbench["sweep"]["2"]["ratio"] == pytest.approx([1.35, 1.35, 1.35])
    # Eight tokens a repeat in 4/15 + 4/16.5 seconds, against 8/10 alone.
    assert humaneval["sweep"]["2"]["ratio"][0] == pytest.approx(8 / (4 / 15 + 4 / 16.5) / 10)
    assert overall["sweep"]["4"]["acceptance_rate"] == pytest.approx(2 / 8)
    assert overall["sweep"]["4"]["block_efficiency"] == 2.0
    assert (result["prompts"], result["repeats"]) == (3, 2)


@pytest.mark.parametrize(
    ("speed", "expected"),
    [
        (12.0, True),  # 1.08 to 1.32 times the target alone
        (10.0, False),  # 0.9 to 1.1: the value may lie above 1, the interval does not
        (10.3, False),
        (5.0, False),
    ],
)
def test_a_speed_up_has_its_whole_interval_above_one(
    tmp_path: Path, speed: float, expected: bool
) -> None:
    journal = run(tmp_path, FakeDecode({0: 10, 1: speed, 2: 1, 4: 1}))
    overall = bench.summarize("openvino", PROMPTS, CONFIG, journal)["overall"]
    value, low, high = overall["sweep"]["1"]["ratio"]
    assert low < value < high
    assert overall["is_speed_up"] is expected
    assert (low > 1) is expected


def test_differing_answers_are_counted(tmp_path: Path) -> None:
    speed = {0: 10, 1: 12, 2: 15, 4: 9}
    same = bench.summarize("openvino", PROMPTS, CONFIG, run(tmp_path / "a", FakeDecode(speed)))
    assert (same["answers_compared"], same["answers_differing"]) == (9, 0)
    decode = FakeDecode(speed, {("H/1", 2), ("7", 4)})
    other = bench.summarize("openvino", PROMPTS, CONFIG, run(tmp_path / "b", decode))
    assert (other["answers_compared"], other["answers_differing"]) == (9, 2)
