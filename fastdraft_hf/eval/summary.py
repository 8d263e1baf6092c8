"""A run's records as rows and sentences, for the card, the report and the terminal."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastdraft_hf._atomic import read_json

TRAINING_STAGES = ("pretrain", "continue", "align")


@dataclass
class RunSummary:
    """The results of a run, read from its stage folders.

    Attributes:
        evaluation: ``results.json`` of stage evaluate, ``None`` if it has not run.
        bench: the same of stage bench.
        provenance: each finished stage's provenance record, in the order of the run.
        logs: each training stage's log history.
    """

    evaluation: dict[str, Any] | None
    bench: dict[str, Any] | None
    provenance: dict[str, dict[str, Any]]
    logs: dict[str, list[dict[str, Any]]]


def read_summary(folders: dict[str, Path]) -> RunSummary:
    """Read a run from its stages' folders, by name; missing ones are skipped."""

    def read(stage: str, name: str) -> Any:
        path = folders[stage] / name if stage in folders else None
        if path is None or not path.exists():
            return None
        return read_json(path)

    records = {stage: read(stage, "provenance.json") for stage in folders}
    logs = {stage: read(stage, "log.json") for stage in TRAINING_STAGES}
    return RunSummary(
        evaluation=read("evaluate", "results.json"),
        bench=read("bench", "results.json"),
        provenance={stage: record for stage, record in records.items() if record},
        logs={stage: log for stage, log in logs.items() if log},
    )


def with_interval(triple: Sequence[float], digits: int = 2) -> str:
    """Format ``[value, low, high]``."""
    value, low, high = (f"{v:.{digits}f}" for v in triple)
    return f"{value} ({low} to {high})"


def acceptance_rows(evaluation: dict[str, Any]) -> list[dict[str, str]]:
    """Return one row per task set, temperature and γ, and one of the draft before training.

    ``expected`` is the teacher-forced acceptance rate.
    """
    settings = evaluation["settings"]
    expects = any("expected" in (s["overall"] or {}) for s in settings)
    rows = []
    for task in [*evaluation["tasks"], "overall"]:
        for setting in (*settings, evaluation):
            figures = setting["overall"] if task == "overall" else setting["tasks"][task]
            prefix = ""
            if setting is evaluation:
                prefix, figures = "before training, ", figures.get("untrained")
            if figures is None:
                continue
            temperature, expected = setting["temperature"], ""
            if "expected" in figures:
                expected = with_interval(figures["expected"]["acceptance_rate"], 3)
            rows.append(
                {
                    "task set": task,
                    "decoding": prefix + (f"T = {temperature:g}" if temperature else "greedy"),
                    "γ": str(setting["num_assistant_tokens"]),
                    "prompts": str(figures["prompts"]),
                    "acceptance rate": with_interval(figures["acceptance_rate"], 3),
                    **({"expected": expected} if expects else {}),
                    "block efficiency": with_interval(figures["block_efficiency"]),
                    "MBSU": with_interval(figures["mbsu"]),
                    "by position": " ".join(f"{v:.2f}" for v in figures["acceptance_by_position"]),
                    "by text length": _by_length(figures.get("acceptance_by_length", {})),
                }
            )
    return rows


def _by_length(bands: dict[str, Sequence[float]]) -> str:
    return " ".join(f"{name}: {rate:.2f}" for name, (_, _, rate) in bands.items())


def held_out_sentence(evaluation: dict[str, Any]) -> str:
    """Name the task sets whose text was in the training data, as far as is known; else ""."""
    names = ", ".join(evaluation.get("not_held_out", []))
    text = f"Training did not leave out the text of {names}: acceptance may be overstated."
    return text if names else ""


def cut_words(results: dict[str, Any]) -> str:
    """Say how many prompts a time limit left, and which settings; "" if it left all."""
    prompts, missing = results.get("prompts"), results.get("left_out")
    cut = [f"{len(missing)} settings not timed"] if missing else []
    if prompts and prompts["measured"] < prompts["drawn"]:
        least, most = prompts["measured"], prompts.get("most", 0)
        counted = f"{least} to {most}" if most > least else f"{least}"
        cut.insert(0, f"{counted} of {prompts['drawn']} prompts")
    return "; ".join(cut)


def cut_sentence(results: dict[str, Any] | None) -> str:
    """Return `cut_words` as a sentence."""
    words = cut_words(results or {})
    return f"The time limit cut this to {words}." if words else ""


def greedy_sentence(evaluation: dict[str, Any]) -> str:
    """Say on how many prompts greedy output is the target's own, and why not on the others."""
    same, total = evaluation["greedy_identical"], evaluation["greedy_prompts"]
    text = f"Greedy output is identical to the target alone on {same} of {total} prompts."
    ties = sum(d["tie"] for d in evaluation["greedy_differences"])
    if ties:
        text += f" On {ties} it differs at a near-tie of the target's logits."
    if same + ties < total:
        text += f" On {total - same - ties} it differs without one: a fault, please report it."
    return text


def gain_sentence(evaluation: dict[str, Any]) -> str:
    """Say what training changed, on prompts that were measured before it too; else ""."""
    before = evaluation["overall"].get("untrained") or {}
    if "gain" not in before:
        return ""
    return (
        f"On {before['prompts']} prompts that were measured before training too, it changed the "
        f"acceptance rate by {with_interval(before['gain'], 3)}."
    )


def acceptance_sentences(evaluation: dict[str, Any]) -> list[str]:
    """Return what has to be said below the rows of `acceptance_rows`."""
    makers = (held_out_sentence, cut_sentence, gain_sentence, greedy_sentence)
    return [text for make in makers if (text := make(evaluation))]


# Below the rows of `speed_rows`.
SPEED_NOTE = (
    "Ratios are to the target alone through the same engine and kernels, with 95% bootstrap "
    "intervals over prompts. γ was chosen on one half of the prompts and judged on the "
    "other, averaged over ways to halve them, so a ratio can be lower than that of the two speeds "
    "beside it. Our loop (ours, ours-openvino) copies what stands in the text already beside what "
    "it drafts. Our kernels: the speed of our loop without a draft over stock decoding."
)


def speed_rows(bench: dict[str, Any]) -> list[dict[str, str]]:
    """Return one row per path and task set: speed alone and with the draft at its best γ.

    The ratio is the judged one: of prompts on which γ was not chosen.
    """
    return [
        {
            "path": name,
            "task set": task,
            "prompts": str(figures["prompts"]),
            "target alone, tokens/s": f"{figures['alone_tokens_per_second']:.1f}",
            "with the draft, tokens/s": f"{figures['sweep'][gamma]['tokens_per_second']:.1f}",
            "ratio": with_interval(figures["judged"]["ratio"]),
            "best γ": gamma,
            "our kernels": with_interval(stock["kernels_ratio"]) if stock else "",
        }
        for name, found in bench["paths"].items()
        for task, figures in [*found["tasks"].items(), ("overall", found["overall"])]
        for gamma, stock in [(str(figures["best_num_assistant_tokens"]), figures.get("stock"))]
    ]


def verdict(bench: dict[str, Any] | None) -> str:
    """Say in plain words whether the draft is a speed-up on this machine, and in which setting.

    The ratio is to the target alone through the same kernels.
    """
    if bench is None or not bench["paths"]:
        return "Wall clock was not measured."
    best = bench["best"]
    value, low, high = best["judged"]["ratio"]
    word = "no clear speed-up (the interval contains 1)"
    if best["is_speed_up"]:
        word = "a speed-up"
    elif high < 1:
        word = "no speed-up (the draft costs more time than it saves)"
    text = (
        f"{value:.2f}x ({low:.2f} to {high:.2f}) the speed of the target alone through the same "
        f"kernels, {word}: {best['path']} with γ = {best['num_assistant_tokens']}, "
        f"{best['tokens_per_second']:.1f} tokens/s."
    )
    alone = best["fastest_alone"]
    if alone["tokens_per_second"] >= best["tokens_per_second"]:
        text += (
            " The target alone is faster than every setting with a draft: "
            f"{alone['tokens_per_second']:.1f} tokens/s ({alone['engine']})."
        )
    return text


def budget_sentence(summary: RunSummary) -> str:
    """Compare the tokens of all training stages, in the run and before it, with the paper's."""
    earlier = summary.provenance.get("design", {}).get("facts", {}).get("earlier") or {}
    facts = [summary.provenance.get(stage, {}).get("facts", {}) for stage in TRAINING_STAGES]
    tokens = sum(int(one.get("tokens", 0)) for one in (earlier, *facts))
    # "About 10 BT in all" (section 5).
    return (
        f"The draft was trained on {tokens:,} tokens; the drafts of the paper, on about 10 billion."
    )


def closing_sentences(summary: RunSummary, machine: str) -> list[str]:
    """Say what was gained, on what that was measured, and what to do for another target."""
    bench, gained, drawn = summary.bench, verdict(None), 0
    if bench is not None and bench["paths"]:
        name = bench["best"]["path"]
        each = " and ".join(
            f"{task} {with_interval(figures['judged']['ratio']).replace(' ', 'x ', 1)}"
            for task, figures in bench["paths"][name]["tasks"].items()
        )
        gained = f"With the draft, {name} answers {each} as fast as without it."
        drawn = bench["paths"][name]["overall"]["prompts"]
    return [
        gained,
        f"That was measured on greedy text from {drawn} prompts, on {machine}."
        if drawn
        else budget_sentence(summary),
        "For your own model: fastdraft run --target ORG/MODEL --hours 3. The more text the target "
        "writes and the draft reads, the faster it gets, so give it the hours that you have.",
    ]


def stage_rows(provenance: dict[str, dict[str, Any]]) -> list[dict[str, str]]:
    """Return one row per stage: its product, what time cut, planned and wall time, peak memory."""
    return [
        {
            "stage": stage,
            "what": _PRODUCTS[stage](record["facts"]) if stage in _PRODUCTS else "",
            "planned": f"{60 * planned:,.0f} s"
            if (planned := record.get("planned_minutes"))
            else "",
            "wall time": f"{record['wall_seconds']:,.0f} s",
            "peak memory": f"{record['peak_memory_bytes'] / 2**30:.1f} GiB",
            "cut to": "; ".join(record.get("cut", [])),
        }
        for stage, record in provenance.items()
    ]


def _designed(facts: dict[str, Any]) -> str:
    what = f"{facts['draft_parameters']:,} parameters"
    if earlier := facts.get("earlier"):
        return (
            f"{what}, trained before on {earlier['tokens']:,} tokens in {earlier['seconds']:,.0f} s"
        )
    return f"{what}, initialization: {facts['init']}"


def _generated(facts: dict[str, Any]) -> str:
    rows, tokens = (
        sum(one[key] for one in facts["sets"].values()) for key in ("rows", "completion_tokens")
    )
    return f"{rows:,} texts, {tokens:,} tokens written by the target ({facts['engine']})"


# The product of a stage, from the facts of its provenance record.
_PRODUCTS: dict[str, Callable[[dict[str, Any]], str]] = {
    "design": _designed,
    "generate": _generated,
    "logits": lambda f: (
        f"the target's distribution for {sum(s['rows'] for s in f['sets'].values()):,} texts"
    ),
    **dict.fromkeys(TRAINING_STAGES, lambda f: f"{f['tokens']:,} tokens in {f['steps']:,} steps"),
    "reduced_vocabulary": lambda f: (
        f"a head of {f['draft_vocab_size']:,} of {f['vocabulary']:,} tokens"
    ),
    "export": lambda f: (
        f"OpenVINO {', '.join(f['openvino']) or 'left out'}"
        + (f", GGUF {', '.join(f['gguf'])}" if f.get("gguf") else "")
    ),
    "evaluate": lambda f: f"greedy text of {f['greedy_prompts']} prompts compared",
    "bench": ", ".join,
}


def markdown_table(rows: list[dict[str, str]]) -> str:
    """Return rows of equal keys as a Markdown table."""
    if not rows:
        return ""
    head = list(rows[0])
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(row[key] for key in head) + " |" for row in rows]
    return "\n".join(lines)


def print_table(rows: Sequence[dict[str, str]]) -> None:
    """Print rows of equal keys to standard error."""
    from rich.console import Console
    from rich.table import Table

    if not rows:
        return
    table = Table(box=None, pad_edge=False)
    for key in rows[0]:
        table.add_column(key, no_wrap=key != "cut to")
    for row in rows:
        table.add_row(*row.values())
    # A log has no width of its own; a table cut at 80 columns would lose figures.
    width = max(Console(stderr=True).width, 240)
    Console(stderr=True, width=width).print(table)


def print_evaluation(evaluation: dict[str, Any]) -> None:
    """Print the acceptance table and its sentences to standard error."""
    print_table(acceptance_rows(evaluation))
    print("", *acceptance_sentences(evaluation), sep="\n", file=sys.stderr)


def print_bench(bench: dict[str, Any]) -> None:
    """Print the tables of a benchmark and its verdict to standard error."""
    if bench["paths"]:
        print_table(speed_rows(bench))
        print(f"\n{SPEED_NOTE}", file=sys.stderr)
    print("\n" + " ".join(filter(None, (verdict(bench), cut_sentence(bench)))), file=sys.stderr)
