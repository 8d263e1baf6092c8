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


# Under the rows of `speed_rows`, where γ was judged.
SPEED_NOTE = (
    "Ratios are to the target alone through the same engine, with 95% bootstrap intervals over "
    "prompts and repeats. γ was chosen on one half of the prompts and judged on the other, "
    "averaged over ways to halve them, so a ratio can be lower than that of the two speeds beside "
    "it. First token: alone / with the draft, median."
)


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
    """Return one row per path and task set: speed alone and with the draft at its best γ.

    The ratio is the judged one: of prompts that had no say in the choice of γ.
    """
    rows = []
    for name, found in bench["paths"].items():
        for task, figures in [*found["tasks"].items(), ("overall", found["overall"])]:
            gamma = str(figures["best_num_assistant_tokens"])
            best = figures["sweep"][gamma]
            row = {
                "path": path_words(name),
                "task set": task,
                "target alone, tokens/s": f"{figures['alone_tokens_per_second']:.1f}",
                "with the draft, tokens/s": f"{best['tokens_per_second']:.1f}",
                "ratio": with_interval(judged_ratio(figures)),
                "best γ": gamma,
            }
            if figures.get("alone_first_token_seconds") is not None:
                alone, drafted = figures["alone_first_token_seconds"], best["first_token_seconds"]
                row["first token, ms"] = f"{1e3 * alone:.0f} / {1e3 * drafted:.0f}"
            rows.append(row)
    return rows


def path_words(name: str) -> str:
    """Return a key of ``paths`` as words: the path, and the draft where it is another one."""
    path, _, draft = name.partition("/")
    return f"{path}, draft {draft}" if draft else path


def judged_ratio(figures: dict[str, Any]) -> list[float]:
    """Return a path's ratio and interval; of the best γ's own runs where no other was judged."""
    best = figures["sweep"][str(figures["best_num_assistant_tokens"])]
    ratio: list[float] = figures.get("judged", best)["ratio"]
    return ratio


def comparison_rows(bench: dict[str, Any]) -> list[dict[str, str]]:
    """Return one row for every two paths that took turns, each at its best γ, over all prompts."""
    return [
        {
            "path": f"{path_words(found['path'])}, γ = {found['num_assistant_tokens']}",
            "over": f"{path_words(found['over'])}, γ = {found['over_num_assistant_tokens']}",
            "ratio": with_interval(found["ratio"]),
        }
        for found in bench.get("comparisons", [])
    ]


def memory_rows(bench: dict[str, Any]) -> list[dict[str, str]]:
    """Return one row per path: the peak memory of a process that does nothing else."""
    memory = bench.get("memory", {})
    columns = {"peak_bytes": "peak memory, GiB", "gpu_peak_bytes": "peak GPU memory, GiB"}
    known = [key for key in columns if any(peaks[key] is not None for peaks in memory.values())]
    return [
        {
            "path": path_words(name),
            **{
                columns[key]: "" if peaks[key] is None else f"{peaks[key] / 2**30:.2f}"
                for key in known
            },
        }
        for name, peaks in memory.items()
        if known
    ]


def verdict(bench: dict[str, Any] | None) -> str:
    """Say in plain words whether the draft is a speed-up on this machine, and which setting."""
    if bench is None or not bench["paths"]:
        return "Wall clock was not measured."
    sentences = []
    best = bench.get("best")
    if best is not None:
        name = f"{best['path']}/{best['draft']}" if best["draft"] else best["path"]
        speed, alone = best["tokens_per_second"], best["fastest_alone"]
        ratio = best["judged"]["ratio"]
        sentences.append(
            f"The fastest setting is {path_words(name)} with γ = {best['num_assistant_tokens']}: "
            f"{speed:.1f} tokens/s; choosing like that gives {ratio[0]:.2f}x ({ratio[1]:.2f} to "
            f"{ratio[2]:.2f}) of the target alone there: {_word(best['is_speed_up'], ratio[2])}."
        )
        if alone["tokens_per_second"] >= speed:
            sentences.append(
                f"The target alone is faster than any of them: {alone['tokens_per_second']:.1f} "
                f"tokens/s ({alone['engine']})."
            )
    for name, found in bench["paths"].items():
        overall = found["overall"]
        value, low, high = judged_ratio(overall)
        sentence = (
            f"Through {path_words(name)}, {value:.2f}x ({low:.2f} to {high:.2f}) at "
            f"γ = {overall['best_num_assistant_tokens']}: {_word(overall['is_speed_up'], high)}"
        )
        plain = overall.get("without_draft")
        if plain is not None:
            loop, drafting = plain["ratio"][0], with_interval(plain["best_over_this"])
            sentence += f"; the loop without a draft gives {loop:.2f}x, drafting {drafting} of that"
        sentences.append(f"{sentence}.")
    return " ".join(sentences)


def _word(is_speed_up: bool, high: float) -> str:
    if is_speed_up:
        return "a speed-up"
    if high < 1:
        return "no speed-up: the draft costs more time than it saves"
    return "no clear speed-up: the interval holds 1"


# "About 10 BT in all" (the paper, section 5).
PAPER_TOKENS = 10_000_000_000


def trained_tokens(summary: RunSummary) -> int:
    """Return the tokens that all training stages read, of the run and before it."""
    facts = [summary.provenance.get(stage, {}).get("facts", {}) for stage in TRAINING_STAGES]
    earlier = summary.provenance.get("design", {}).get("facts", {}).get("earlier") or {}
    return int(earlier.get("tokens", 0)) + sum(int(f.get("tokens", 0)) for f in facts)


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
        if not facts.get("earlier"):
            return f"{what}, initialization: {facts['init']}"
        tokens, seconds = facts["earlier"]["tokens"], facts["earlier"]["seconds"]
        return f"{what}, a draft that was trained before: {tokens:,} tokens in {seconds:,.0f} s"
    if stage == "generate":
        tokens = sum(s["completion_tokens"] for s in facts["sets"].values())
        rows = sum(s["rows"] for s in facts["sets"].values())
        return f"{rows:,} texts, {tokens:,} tokens written by the target ({facts['engine']})"
    if stage in TRAINING_STAGES:
        return f"{facts['tokens']:,} tokens in {facts['steps']:,} steps"
    if stage == "logits":
        return f"the target's distribution at {sum(facts['tokens'].values()):,} tokens"
    if stage == "reduced_vocabulary":
        return f"a head of {facts['draft_vocab_size']:,} of {facts['vocabulary']:,} tokens"
    if stage == "export":
        said = "OpenVINO " + (", ".join(facts["openvino"]) or "left out")
        return said + (f", GGUF {', '.join(facts['gguf'])}" if facts.get("gguf") else "")
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
