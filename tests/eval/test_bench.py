"""What is timed and in which order."""

import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from fastdraft_hf import FastDraftError
from fastdraft_hf.decode.records import DecodingRecord
from fastdraft_hf.eval import bench
from fastdraft_hf.eval.bench import Setting
from fastdraft_hf.eval.config import BenchConfig
from fastdraft_hf.eval.journal import Journal
from fastdraft_hf.eval.prompts import EvaluationPrompt

PROMPTS = [
    EvaluationPrompt("humaneval", "H/0", (1,)),
    EvaluationPrompt("humaneval", "H/1", (2,)),
    EvaluationPrompt("ifbench", "7", (3,)),
]
CONFIG = BenchConfig()
SETTINGS = bench.all_settings(bench.assisted_settings(["transformers", "ours"], [1, 2]))


class FakeDecode:
    """Remembers what it was asked."""

    def __init__(self) -> None:
        self.calls: list[tuple[Setting, str, int]] = []

    def __call__(
        self, setting: Setting, prompt: EvaluationPrompt, max_new_tokens: int
    ) -> DecodingRecord:
        self.calls.append((setting, prompt.key, max_new_tokens))
        return DecodingRecord(
            path=setting.path,
            task=prompt.task,
            key=prompt.key,
            temperature=0.0,
            num_assistant_tokens=setting.num_assistant_tokens,
            tokens=[1, 2, 3, 4],
            seconds=0.1,
            target_passes=4,
        )


def run(folder: Path, decode: FakeDecode, deadline: float = math.inf) -> Journal:
    folder.mkdir(exist_ok=True)
    journal = Journal(folder / "records.jsonl")
    bench.collect("pytorch", decode, SETTINGS, PROMPTS, CONFIG, journal, deadline)
    return journal


def timed(journal: Journal, prompts: list[EvaluationPrompt]) -> list[str]:
    """Return the prompts timed in every setting, by key."""
    records = bench.complete_records(journal, SETTINGS, prompts)
    (keys,) = {tuple(record.key for record in one) for one in records.values()}
    return list(keys)


def test_what_is_compared_is_timed_beside_what_it_is_compared_to() -> None:
    found = bench.all_settings(bench.assisted_settings(["transformers", "ours"], [1, 2]))
    assert found == [
        Setting("alone"),
        Setting("ours"),  # our loop with nothing drafted
        Setting("transformers", 1),
        Setting("ours", 1),
        Setting("transformers", 2),
        Setting("ours", 2),
    ]
    openvino = bench.assisted_settings(["openvino", "openvino-prompt-lookup", "ours-openvino"], [3])
    assert bench.all_settings(openvino)[:3] == [
        Setting("ours-openvino-alone"),
        Setting("openvino-alone"),
        Setting("ours-openvino"),
    ]


def test_settings_take_turns_on_every_prompt_in_both_orders(tmp_path: Path) -> None:
    decode = FakeDecode()
    journal = run(tmp_path, decode)
    warm_up, timed = decode.calls[: len(SETTINGS)], decode.calls[len(SETTINGS) :]
    assert [(s, key) for s, key, _ in warm_up] == [(s, "H/0") for s in SETTINGS]
    assert {longest for _, _, longest in warm_up} == {16}
    assert {longest for _, _, longest in timed} == {CONFIG.max_new_tokens}
    assert len(journal) == len(timed) == len(PROMPTS) * len(SETTINGS)
    blocks = [timed[i : i + len(SETTINGS)] for i in range(0, len(timed), len(SETTINGS))]
    assert [block[0][1] for block in blocks] == ["H/0", "H/1", "7"]
    forth, back = SETTINGS, SETTINGS[::-1]
    orders = [[s for s, _, _ in block] for block in blocks]
    assert orders == [forth, back, back]
    # Over two prompts of a task set no setting has a better position than another.
    places: Counter[Setting] = Counter()
    for block in blocks[:2]:
        for place, (setting, _, _) in enumerate(block):
            places[setting] += place
    assert set(places.values()) == {len(SETTINGS) - 1}


def test_a_killed_bench_times_only_what_is_missing(tmp_path: Path) -> None:
    decode = FakeDecode()
    run(tmp_path, decode)
    path = tmp_path / "records.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    path.write_text("".join(lines[:10]) + lines[10][:30], encoding="utf-8")
    again = FakeDecode()
    journal = run(tmp_path, again)
    warm = len(SETTINGS)
    assert again.calls[warm:] == decode.calls[warm:][10:]
    assert len(journal) == len(lines)
    finished = FakeDecode()
    run(tmp_path, finished)
    assert finished.calls == []


class SlowDecode(FakeDecode):
    """Takes a second for a warm-up and four for an answer."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.now = 0.0
        monkeypatch.setattr(bench.time, "monotonic", lambda: self.now)

    def __call__(self, *given: Any) -> DecodingRecord:
        self.now += 1 if given[2] == 16 else 4
        return super().__call__(*given)


def test_a_short_time_leaves_out_prompts_then_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def collect(name: str, seconds: float) -> tuple[list[Setting], Journal]:
        decode, journal = SlowDecode(monkeypatch), Journal(tmp_path / name)
        kept = bench.collect("x", decode, SETTINGS, PROMPTS, CONFIG, journal, seconds)
        assert decode.now <= max(seconds, 10)
        return kept, journal

    # Six settings: 6 s of warm-up, then 24 s a prompt.
    kept, journal = collect("two", 6 + 2 * 24 + 5)
    assert kept == SETTINGS[2:]
    assert timed(journal, PROMPTS) == ["H/0", "H/1"]
    kept, journal = collect("one", 25)  # γ = 2 is left out, of one path or both
    assert kept == SETTINGS[2:5]
    assert len(journal) == 5
    # No time at all: one prompt, target alone and the first setting.
    kept, journal = collect("none", -1)
    assert kept == [Setting("transformers", 1)]
    assert {record.path for record in journal.values()} == {"alone", "transformers"}
    # A later start without a limit completes it.
    kept = bench.collect("x", FakeDecode(), SETTINGS, PROMPTS, CONFIG, journal)
    assert kept == SETTINGS[2:]
    assert timed(journal, PROMPTS) == ["H/0", "H/1", "7"]


def test_a_fast_runtime_keeps_the_prompts_that_a_slow_one_has_no_time_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode = SlowDecode(monkeypatch)

    def load(models: bench.Models, settings: list[Setting]) -> Any:
        def answer(setting: Setting, *given: Any) -> DecodingRecord:
            began = decode.now
            record = decode(setting, *given)
            if setting.path in bench.OPENVINO:
                decode.now = began + (decode.now - began) / 8
            return record

        return answer

    monkeypatch.setattr(bench, "load_engine", load)
    assisted = bench.assisted_settings(["openvino", "transformers"], [1, 2])
    config = BenchConfig(max_minutes=0.6)
    found = bench.run_bench(bench.Models("target"), assisted, PROMPTS, config, tmp_path)
    counts = {setting.path: len(records) for setting, records in found.items()}
    assert counts == {"openvino-alone": 3, "openvino": 3, "alone": 2, "transformers": 2}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"num_assistant_tokens": [0]}, r"num_assistant_tokens\[0\]: must be at least 1"),
        ({"max_minutes": 0}, "max_minutes: must be above 0"),
    ],
)
def test_settings_that_cannot_be_timed_are_refused(given: dict[str, object], message: str) -> None:
    with pytest.raises(FastDraftError, match=message):
        BenchConfig(**given)  # type: ignore[arg-type]
