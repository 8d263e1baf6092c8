"""What a run's own records say, gathered once for the card, the report and the terminal."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TRAINING_STAGES = ("pretrain", "continue", "align")


@dataclass
class RunSummary:
    """The results of a run, read from its stage folders.

    Attributes:
        evaluation: ``results.json`` of stage evaluate, ``None`` when it has not run.
        bench: the same of stage bench.
        provenance: each finished stage's provenance record, in the order of the run.
        logs: each training stage's log history.
    """

    evaluation: dict[str, Any] | None
    bench: dict[str, Any] | None
    provenance: dict[str, dict[str, Any]]
    logs: dict[str, list[dict[str, Any]]]


def read_summary(folders: dict[str, Path]) -> RunSummary:
    """Read a run.

    Args:
        folders: stage name to stage folder; those that do not exist are left out.
    """

    def read(stage: str, name: str) -> Any:
        path = folders[stage] / name if stage in folders else None
        if path is None or not path.exists():
            return None
        return json.loads(path.read_text(encoding="utf-8"))

    records = {stage: read(stage, "provenance.json") for stage in folders}
    logs = {stage: read(stage, "log.json") for stage in TRAINING_STAGES}
    return RunSummary(
        evaluation=read("evaluate", "results.json"),
        bench=read("bench", "results.json"),
        provenance={stage: record for stage, record in records.items() if record},
        logs={stage: log for stage, log in logs.items() if log},
    )


def with_interval(triple: list[float], digits: int = 2) -> str:
    """Format [value, low, high]."""
    value, low, high = (f"{v:.{digits}f}" for v in triple)
    return f"{value} ({low} to {high})"


def settings_of(evaluation: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the figures of each γ and temperature; those of older results are of one."""
    if "settings" in evaluation:
        return list(evaluation["settings"])
    return [
        {
            "num_assistant_tokens": evaluation["num_assistant_tokens"],
            "temperature": temperature,
            "tasks": {task: found.get(run) for task, found in evaluation["tasks"].items()},
            "overall": evaluation["overall"].get(run),
        }
        for run, temperature in (("sampled", evaluation["temperature"]), ("greedy", 0.0))
    ]


def acceptance_rows(evaluation: dict[str, Any]) -> list[dict[str, str]]:
    """Return one row per task set, temperature and γ, and one for the draft before training.

    ``expected`` is the teacher-forced acceptance rate; a star marks an interval that shares nothing
    with that of decoding.
    """
    settings = settings_of(evaluation)
    expects = any("expected" in (s["overall"] or {}) for s in settings)
    rows = []
    for task in [*evaluation["tasks"], "overall"]:
        own = [s["overall"] if task == "overall" else s["tasks"][task] for s in settings]
        taken = [
            (_decoding(s["temperature"]), s["num_assistant_tokens"], figures)
            for s, figures in zip(settings, own, strict=True)
        ]
        first = evaluation["overall"] if task == "overall" else evaluation["tasks"][task]
        untrained = f"untrained, {_decoding(evaluation['temperature'])}"
        taken.append((untrained, evaluation["num_assistant_tokens"], first.get("untrained")))
        for name, gamma, figures in taken:
            if figures is None:
                continue
            row = {
                "task set": task,
                "decoding": name,
                "γ": str(gamma),
                "prompts": str(figures["prompts"]),
                "acceptance rate": with_interval(figures["acceptance_rate"], 3),
                "expected": _expected_cell(figures),
                "block efficiency": with_interval(figures["block_efficiency"]),
                "MBSU": with_interval(figures["mbsu"]),
                "by position": " ".join(f"{v:.2f}" for v in figures["acceptance_by_position"]),
            }
            if not expects:
                del row["expected"]
            rows.append(row)
    return rows


def _decoding(temperature: float) -> str:
    return f"T = {temperature:g}" if temperature else "greedy"


def _expected_cell(figures: dict[str, Any]) -> str:
    if "expected" not in figures:
        return ""
    cell = with_interval(figures["expected"]["acceptance_rate"], 3)
    return cell if figures["intervals_overlap"] else f"{cell} *"


def estimators_sentence(evaluation: dict[str, Any]) -> str:
    """Say whether decoding and the teacher-forced estimate agree; "" where one was not made."""
    found = [
        figures["intervals_overlap"]
        for setting in settings_of(evaluation)
        for figures in (*setting["tasks"].values(), setting["overall"])
        if figures is not None and "intervals_overlap" in figures
    ]
    if not found:
        return ""
    sentence = (
        "Expected: the acceptance rate by the two models' distributions along the sampled texts, "
        "read once and not decoded. Its interval overlaps that of decoding in "
        f"{sum(found)} of {len(found)} rows."
    )
    return sentence if all(found) else f"{sentence} A star marks the others."


def held_out_sentence(evaluation: dict[str, Any]) -> str:
    """Name the task sets that training did not leave out; "" when it left out all."""
    names = evaluation.get("not_held_out", [])
    if not names:
        return ""
    return f"Training did not leave out the text of {', '.join(names)}: figures may flatter."


def speed_rows(bench: dict[str, Any]) -> list[dict[str, str]]:
    """Return one row per path and task set: tokens/s alone and with the draft at its best γ."""
    rows = []
    for path, found in bench["paths"].items():
        for task, figures in [*found["tasks"].items(), ("overall", found["overall"])]:
            gamma = str(figures["best_num_assistant_tokens"])
            best = figures["sweep"][gamma]
            rows.append(
                {
                    "path": path,
                    "task set": task,
                    "target alone, tokens/s": f"{figures['alone_tokens_per_second']:.1f}",
                    "with the draft, tokens/s": f"{best['tokens_per_second']:.1f}",
                    "ratio": with_interval(best["ratio"]),
                    "best γ": gamma,
                }
            )
    return rows


def verdict(bench: dict[str, Any] | None) -> str:
    """Say in plain words whether the draft is a speed-up on this machine."""
    if bench is None or not bench["paths"]:
        return "Wall clock was not measured."
    sentences = []
    for path, found in bench["paths"].items():
        overall = found["overall"]
        gamma = str(overall["best_num_assistant_tokens"])
        value, low, high = overall["sweep"][gamma]["ratio"]
        if overall["is_speed_up"]:
            word = "a speed-up"
        elif high < 1:
            word = "no speed-up: the draft costs more time than it saves"
        else:
            word = "no clear speed-up: the interval holds 1"
        sentences.append(
            f"Through {path}, {value:.2f}x ({low:.2f} to {high:.2f}) at γ = {gamma}: {word}."
        )
    return " ".join(sentences)


# "About 10 BT in all" (the paper, section 5).
PAPER_TOKENS = 10_000_000_000


def trained_tokens(summary: RunSummary) -> int:
    """Return the tokens that all training stages of the run read."""
    facts = [summary.provenance.get(stage, {}).get("facts", {}) for stage in TRAINING_STAGES]
    return sum(int(f.get("tokens", 0)) for f in facts)


def budget_sentence(summary: RunSummary) -> str:
    """Say how far the run's budget goes, against the paper's."""
    tokens = trained_tokens(summary)
    sentence = f"The draft read {tokens:,} tokens in training."
    if 0 < tokens < PAPER_TOKENS / 10:
        sentence += (
            f" The paper's drafts read about ten billion, {PAPER_TOKENS / tokens:,.0f} times as "
            "many, and reach acceptance rates of 0.37 on instructions and 0.56 on code "
            "(Phi-3-mini 50M, T = 0.6). At a budget this small acceptance still rises with more "
            "tokens; recipes/README.md lists the recipes that go further."
        )
    return sentence


def stage_rows(provenance: dict[str, dict[str, Any]]) -> list[dict[str, str]]:
    """Return one row per stage: what it read or wrote, and its wall time."""
    rows = []
    for stage, record in provenance.items():
        facts = record["facts"]
        rows.append(
            {
                "stage": stage,
                "what": _what(stage, facts),
                "wall time": f"{record['wall_seconds']:,.0f} s",
                "peak memory": f"{record['peak_memory_bytes'] / 2**30:.1f} GiB",
            }
        )
    return rows


def _what(stage: str, facts: dict[str, Any]) -> str:
    if stage == "design":
        what = f"{facts['draft_parameters']:,} parameters"
        return f"{what}, first weights: {facts['first_weights']}"
    if stage == "generate":
        tokens = sum(s["completion_tokens"] for s in facts["sets"].values())
        rows = sum(s["rows"] for s in facts["sets"].values())
        return f"{rows:,} texts, {tokens:,} tokens written by the target ({facts['engine']})"
    if stage in TRAINING_STAGES:
        return f"{facts['tokens']:,} tokens in {facts['steps']:,} steps"
    if stage == "export":
        return "OpenVINO " + (", ".join(facts["openvino"]) or "left out")
    if stage == "evaluate":
        return f"{facts['greedy_prompts']} prompts"
    return ", ".join(facts) if stage == "bench" else ""


def markdown_table(rows: list[dict[str, str]]) -> str:
    """Return rows of equal keys as a Markdown table."""
    if not rows:
        return ""
    head = list(rows[0])
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(row[key] for key in head) + " |" for row in rows]
    return "\n".join(lines)
