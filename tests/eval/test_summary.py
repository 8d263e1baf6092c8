import copy
import json
from pathlib import Path
from typing import Any

import pytest

from fastdraft_hf.eval.summary import (
    RunSummary,
    acceptance_rows,
    budget_sentence,
    closing_sentences,
    cut_words,
    greedy_sentence,
    print_bench,
    print_evaluation,
    read_summary,
    speed_rows,
    stage_rows,
    verdict,
)


def test_a_run_is_read_from_its_folders(tmp_path: Path) -> None:
    def put(path: str, value: Any) -> None:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(json.dumps(value), encoding="utf-8")

    put("design/provenance.json", {"stage": "design"})
    put("align/provenance.json", {"stage": "align"})
    put("align/log.json", [{"step": 1}])
    put("evaluate/results.json", {"greedy_prompts": 1})
    put("generate/results.json", {"no": "figures"})
    names = ("design", "generate", "pretrain", "align", "evaluate", "bench")
    summary = read_summary({name: tmp_path / name for name in names})
    assert summary == RunSummary(
        evaluation={"greedy_prompts": 1},
        bench=None,
        provenance={"design": {"stage": "design"}, "align": {"stage": "align"}},
        logs={"align": [{"step": 1}]},
    )
    assert read_summary({}) == RunSummary(None, None, {}, {})


def several(run_summary: RunSummary) -> dict[str, Any]:
    """The made-up evaluation with a second γ, as if both estimates had been made."""
    assert run_summary.evaluation is not None
    evaluation: dict[str, Any] = run_summary.evaluation
    settings = evaluation["settings"]
    expected = {"acceptance_rate": [0.41, 0.35, 0.45]}
    second = copy.deepcopy({**settings[0], "num_assistant_tokens": 5})
    for setting in (settings[0], second):
        for figures in (*setting["tasks"].values(), setting["overall"]):
            figures.update(expected=expected)
    evaluation["settings"] = [settings[0], second, settings[1]]
    return evaluation


def test_every_setting_has_its_row(run_summary: RunSummary) -> None:
    evaluation = several(run_summary)
    rows = acceptance_rows(evaluation)
    assert [(row["task set"], row["decoding"], row["γ"]) for row in rows] == [
        (task, decoding, gamma)
        for task in ("humaneval", "ifbench", "overall")
        for decoding, gamma in (
            *(("T = 0.6", "3"), ("T = 0.6", "5"), ("greedy", "3")),
            ("before training, T = 0.6", "3"),
        )
    ]
    assert rows[0]["acceptance rate"] == "0.400 (0.300 to 0.500)"
    assert rows[0]["block efficiency"] == "2.20 (1.50 to 3.00)"
    assert rows[0]["MBSU"] == "1.69 (1.20 to 2.30)"
    assert rows[0]["expected"] == rows[5]["expected"] == "0.410 (0.350 to 0.450)"
    assert rows[2]["expected"] == rows[3]["expected"] == ""
    assert rows[0]["by position"] == "0.60 0.40 0.20"
    assert len({tuple(row) for row in rows}) == 1  # equal keys, as tables need them


def test_the_terminal_says_all_of_it(
    run_summary: RunSummary, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluation = several(run_summary)
    evaluation["not_held_out"] = ["ifbench"]
    bands = ("0-256", "256-1024", "1024-4096", "4096-8192")  # a log has to be wide enough
    for setting in evaluation["settings"]:
        setting["overall"]["acceptance_by_length"] = {name: [9, 9, 0.3] for name in bands}
    print_evaluation(evaluation)
    shown = capsys.readouterr().err
    for row in acceptance_rows(evaluation):
        assert all(cell in shown for cell in row.values())
    assert "Training did not leave out the text of ifbench: acceptance may be overst" in shown
    assert "Greedy output is identical to the target alone on 4 of 4 prompts" in shown


@pytest.mark.parametrize(
    ("ratio", "words"),
    [
        ([1.5, 1.2, 1.8], "a speed-up:"),
        ([0.8, 0.7, 0.9], "no speed-up (the draft costs more time than it saves):"),
        ([1.1, 0.9, 1.3], "no clear speed-up (the interval contains 1):"),
    ],
)
def test_the_verdict_says_what_the_interval_shows(
    bench_results: dict[str, Any], ratio: list[float], words: str
) -> None:
    value, low, high = ratio
    for found in (bench_results["best"], bench_results["paths"]["openvino"]["overall"]):
        found |= {"judged": {"ratio": ratio}, "is_speed_up": low > 1}
    assert verdict(bench_results).startswith(
        f"{value:.2f}x ({low:.2f} to {high:.2f}) the speed of the target alone through the same "
        f"kernels, {words} openvino with γ = 3, 15.0 tokens/s."
    )
    # The table shows the same ratio: that of prompts with no say in the choice of γ.
    rows = {(row["path"], row["task set"]): row for row in speed_rows(bench_results)}
    assert rows["openvino", "overall"]["ratio"] == f"{value:.2f} ({low:.2f} to {high:.2f})"
    assert rows["openvino", "overall"]["with the draft, tokens/s"] == "15.0"
    assert rows["ours", "humaneval"]["best γ"] == "3"
    assert len({tuple(row) for row in rows.values()}) == 1  # one table: the same columns


def test_the_terminal_shows_the_benchmark(
    bench_results: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    bench_results["prompts"] = {"drawn": 16, "measured": 3}
    print_bench(bench_results)
    shown = capsys.readouterr().err
    for words in (
        verdict(bench_results),
        "ours ",
        "1.10 (1.00 to 1.20)",  # our kernels over stock decoding
        "The time limit cut this to 3 of 16 prompts.",
    ):
        assert words in shown
    bench_results["prompts"]["most"] = 9  # of the runtime that was the fastest
    assert cut_words(bench_results) == "3 to 9 of 16 prompts"
    assert "The target alone is faster" not in shown
    bench_results["best"]["fastest_alone"]["tokens_per_second"] = 140.0
    assert (
        "The target alone is faster than every setting with a draft: 140.0 tokens/s "
        "(openvino-alone)."
    ) in verdict(bench_results)
    assert verdict(None) == verdict({"paths": {}}) == "Wall clock was not measured."


def test_the_last_words_are_gain_conditions_and_advice(
    run_summary: RunSummary, bench_results: dict[str, Any]
) -> None:
    bench_results["paths"]["openvino"]["overall"]["prompts"] = 3
    for task, found in bench_results["paths"]["openvino"]["tasks"].items():
        found["judged"] = {"ratio": [1.5, 1.2, 1.8] if task == "humaneval" else [0.9, 0.8, 1.1]}
    gain, where, advice = closing_sentences(run_summary, "a CPU, 2 cores")
    assert "humaneval 1.50x (1.20 to 1.80)" in gain
    assert "0.90x (0.80 to 1.10)" in gain
    assert "openvino" in gain
    assert "3 prompts" in where
    assert "a CPU, 2 cores" in where
    assert "fastdraft run --target" in advice
    run_summary.bench = None
    gain, where, _ = closing_sentences(run_summary, "a CPU, 2 cores")
    assert gain == verdict(None)
    assert where == budget_sentence(run_summary)


def test_greedy_differences_are_ties_or_faults(run_summary: RunSummary) -> None:
    assert run_summary.evaluation is not None
    evaluation: dict[str, Any] = run_summary.evaluation
    assert greedy_sentence(evaluation).endswith("on 4 of 4 prompts.")
    evaluation |= {"greedy_identical": 2, "greedy_differences": [{"tie": True}, {"tie": False}]}
    text = greedy_sentence(evaluation)
    assert "On 1 it differs at a near-tie" in text
    assert "On 1 it differs without one: a fault" in text


def test_every_stage_says_what_it_did_and_cost(run_summary: RunSummary) -> None:
    cut = {"cut": ["chat: 812 of 6,000 rows", "code: 9 of 10 rows"], "planned_minutes": 1.5}
    run_summary.provenance["generate"] |= cut
    rows = {row["stage"]: row for row in stage_rows(run_summary.provenance)}
    assert list(rows) == list(run_summary.provenance)
    assert rows["design"]["what"] == "10,000,000 parameters, initialization: project"
    assert rows["generate"]["what"] == (
        "1,234 texts, 34,567 tokens written by the target (openvino)"
    )
    assert rows["generate"]["cut to"] == "chat: 812 of 6,000 rows; code: 9 of 10 rows"
    assert (rows["generate"]["planned"], rows["align"]["planned"]) == ("90 s", "")
    assert rows["align"]["what"] == "400,000 tokens in 1,500 steps"
    assert rows["export"]["what"] == "OpenVINO left out"
    assert rows["align"]["peak memory"] == "1.5 GiB"


def test_the_budget_is_compared_with_the_papers(run_summary: RunSummary) -> None:
    run_summary.provenance["pretrain"] = {
        "facts": {"tokens": 600_000, "steps": 1},
        "wall_seconds": 1,
        "peak_memory_bytes": 1,
    }
    paper = "the drafts of the paper, on about 10 billion."
    assert budget_sentence(run_summary) == f"The draft was trained on 1,000,000 tokens; {paper}"
