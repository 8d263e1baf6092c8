"""The model card, filled from the run's own records."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastdraft_hf._card import fill_card, template_path
from fastdraft_hf._redact import redacted
from fastdraft_hf.eval.summary import (
    SPEED_NOTE,
    TRAINING_STAGES,
    RunSummary,
    acceptance_rows,
    budget_sentence,
    held_out_sentence,
    judged_ratio,
    markdown_table,
    path_words,
    settings_of,
    speed_rows,
    stage_rows,
    verdict,
)
from fastdraft_hf.hub.metadata import check_metadata

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCard

_PYTHON_LICENSE = "Python standard library (PSF-2.0)"
# The id that a task set has on the Hub; a set of the user's own keeps its name.
_HUB_IDS = {
    "humaneval": "openai/openai_humaneval",
    "ifbench": "allenai/IFBench_test",
    "cnn_dailymail": "abisee/cnn_dailymail",
    "tinystories": "roneneldan/TinyStories",
    "dolly": "databricks/databricks-dolly-15k",
}


@dataclass(frozen=True)
class OpenVINOCopy:
    """Where the card's snippets find the draft as OpenVINO IR.

    Attributes:
        folder: its name, such as ``openvino-int8``.
        path: where it lies on this machine; ``None`` when it lies in the draft's repository.
    """

    folder: str
    path: str | None = None


def best_num_assistant_tokens(summary: RunSummary, default: int) -> int:
    """Return the γ that was fastest through the paths that read it from a PyTorch draft.

    Stock transformers comes before our own loop: who imports this package can set it anew.
    """
    best = best_of_paths(summary.bench, ("transformers", "ours"))
    return default if best is None else best


def best_of_paths(bench: dict[str, Any] | None, order: Sequence[str]) -> int | None:
    """Return the fastest γ through the first of ``order`` that was timed."""
    paths = bench["paths"] if bench else {}
    for path in order:
        if path in paths:
            return int(paths[path]["overall"]["best_num_assistant_tokens"])
    return None


def render_card(
    summary: RunSummary,
    *,
    model_name: str,
    target_name: str,
    target_revision: str | None,
    license: str | None,
    draft_location: str,
    num_assistant_tokens: int,
    base_model: str | None = None,
    language: Sequence[str] = (),
    datasets: Sequence[str] = (),
    openvino: OpenVINOCopy | None = None,
    weights_note: str = "",
) -> ModelCard:
    """Render the card.

    Args:
        summary: the run's records; stage evaluate must have run.
        model_name: the heading.
        target_name: the target's model id.
        target_revision: its commit or file digest, when known.
        license: license identifier of the draft.
        draft_location: where the snippet loads the draft from.
        num_assistant_tokens: γ that the draft's generation config holds.
        base_model: the target's id on the Hub where ``target_name`` is not that.
        language: codes of the languages it was trained on.
        datasets: ids of the datasets it was trained on.
        openvino: the draft's OpenVINO copy, if there is one.
        weights_note: how the weights were changed after they were measured.

    Raises:
        ValueError: the run has no evaluation.
        FastDraftError: the metadata breaks a rule of the Hub.
    """
    evaluation = summary.evaluation
    if evaluation is None:
        raise ValueError("a card needs the results of stage evaluate")
    settings = settings_of(evaluation)
    design = summary.provenance.get("design", {}).get("facts", {})
    sources = _data_rows(summary, license)
    card = fill_card(
        model_name=model_name,
        target_name=target_name,
        draft_location=draft_location,
        license=license,
        base_model=base_model,
        datasets=list(datasets),
        language=list(language),
        eval_results=_eval_results(evaluation) + _speed_results(summary.bench),
        measured=True,
        target_revision=target_revision,
        draft_parameters=f"{evaluation['draft_parameters']:,}",
        target_parameters=f"{evaluation['target_parameters']:,}",
        size_ratio=f"{1 / evaluation['cost_ratio']:.1f}",
        num_assistant_tokens=num_assistant_tokens,
        weights_note=weights_note,
        gamma=" or ".join(
            str(g) for g in dict.fromkeys(s["num_assistant_tokens"] for s in settings)
        ),
        tasks=", ".join(evaluation["tasks"]),
        not_held_out=held_out_sentence(evaluation),
        acceptance_table=markdown_table(acceptance_rows(evaluation)),
        greedy_identical=evaluation["greedy_identical"],
        greedy_prompts=evaluation["greedy_prompts"],
        machine=_machines(summary),
        speed_table=_speed_table(summary.bench) if summary.bench else "",
        verdict=verdict(summary.bench),
        stages_table=markdown_table(stage_rows(summary.provenance)),
        # What it was trained on before stands in the table of stages.
        design=", ".join(
            f"{key} {_plain(value)}" for key, value in design.items() if key != "earlier"
        ),
        objective=_objective(summary),
        cost=_cost(summary),
        data_table=markdown_table(sources),
        limits=budget_sentence(summary),
        provenance=True,
        openvino_folder=openvino.folder if openvino else None,
        openvino_path=openvino.path if openvino else None,
        openvino_num_assistant_tokens=best_of_paths(summary.bench, ("openvino", "ours-openvino"))
        or num_assistant_tokens,
    )
    card.text = redacted(card.text)
    check_metadata(card.data.to_dict())
    return card


def describe_machine(machine: dict[str, Any]) -> str:
    """Return a machine record as words."""
    words = f"{machine['cpu']}, {machine['cpu_count']} cores"
    if "gpu" in machine:
        words += f", {machine['gpu_count']} x {machine['gpu']}"
    return words


def _machines(summary: RunSummary) -> str:
    """Name the machine of the last stage, and the others where stages ran elsewhere."""
    found = [describe_machine(r["machine"]) for r in reversed(summary.provenance.values())]
    first, *others = dict.fromkeys(found)
    return f"{first} (other stages: {'; '.join(others)})" if others else first


def _cost(summary: RunSummary) -> str:
    """Say what the run took: wall time, and energy as far as every stage's was measured."""
    records = list(summary.provenance.values())
    seconds = sum(record["wall_seconds"] for record in records)
    return f"Wall time {seconds / 3600:.2f} hours in all. {_energy(records)}"


_PROCESSORS = {"cpu": "CPUs", "gpu": "GPUs"}


def _energy(records: Sequence[dict[str, Any]]) -> str:
    """Say the energy of the processors that every stage knows, and which they are."""
    if records and all(record.get("energy_joules") for record in records):
        names = [n for n in _PROCESSORS if any(n in r.get("energy_joules_of", {}) for r in records)]
        whose = " and ".join(_PROCESSORS[name] for name in names) or "processors"
        joules = sum(record["energy_joules"] for record in records)
        return f"Energy {joules / 3.6e6:.3g} kWh ({whose}, by their own counters)."
    for name in ("gpu", "cpu"):
        parts = [record.get("energy_joules_of", {}).get(name) for record in records]
        if parts and all(parts):
            kwh = sum(part for part in parts if part) / 3.6e6
            return f"Energy of the {_PROCESSORS[name]} alone {kwh:.3g} kWh; the rest is not known."
    return "Energy was not measured."


def _objective(summary: RunSummary) -> str:
    facts = summary.provenance.get("align", {}).get("facts")
    if facts is None:
        return ""
    objective = facts.get("objective") or {"ce": 1}
    if isinstance(objective, str):
        return objective
    return ", ".join(f"{weight:g} {term}" for term, weight in objective.items())


def _plain(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _eval_results(evaluation: dict[str, Any]) -> list[EvalResult]:
    results = []
    for setting in settings_of(evaluation):
        if not setting["temperature"]:  # greedy acceptance is another figure than the paper's
            continue
        gamma, temperature = setting["num_assistant_tokens"], setting["temperature"]
        for task, figures in setting["tasks"].items():
            for name, key in (
                ("Acceptance rate", "acceptance_rate"),
                ("Block efficiency", "block_efficiency"),
            ):
                if figures is not None:
                    how = f"γ = {gamma}, T = {temperature:g}"
                    results.append(_result(task, key, name, how, figures[key], 4))
    return results


def _speed_results(bench: dict[str, Any] | None) -> list[EvalResult]:
    """Return the ratio of speeds for every path and task set, the judged one."""
    results = []
    for path, found in (bench["paths"] if bench else {}).items():
        for task, figures in found["tasks"].items():
            how = f"{path_words(path)}, greedy, γ = {figures['best_num_assistant_tokens']}"
            ratio = judged_ratio(figures)
            results.append(_result(task, "speed_up", "Speed-up", how, ratio, 3))
    return results


def _result(
    task: str, key: str, name: str, how: str, triple: Sequence[float], digits: int
) -> EvalResult:
    """Return one entry of the model index; the Hub shows its name and value, so both say all."""
    from huggingface_hub import EvalResult

    value, low, high = (round(number, digits) for number in triple)
    return EvalResult(
        task_type="text-generation",
        task_name="Speculative decoding",
        dataset_type=_HUB_IDS.get(task) or re.sub(r"[^A-Za-z0-9_.-]+", "-", task) or "prompts",
        dataset_name=task,
        metric_type=key,
        metric_name=f"{name} ({how}; 95% {low:g} to {high:g})",
        metric_value=value,
        metric_args={"confidence_level": 0.95, "low": low, "high": high},
    )


def _speed_table(bench: dict[str, Any]) -> str:
    table = markdown_table(speed_rows(bench))
    return f"{table}\n\n{SPEED_NOTE}" if bench.get("best") else table


def _data_rows(summary: RunSummary, license: str | None) -> list[dict[str, str]]:
    """Return one row per training stage and source: what was read, and under which license."""
    generated = set(summary.provenance.get("generate", {}).get("facts", {}).get("sets", {}))
    rows = []
    for stage in TRAINING_STAGES:
        facts = summary.provenance.get(stage, {}).get("facts", {})
        for source, counts in facts.get("data", {}).get("sources", {}).items():
            known = counts if isinstance(counts, dict) else {}
            if source.split(" #")[0] in generated:
                words = f"{source}: text the target wrote itself"
                terms = f"the target's ({license})" if license else "the target's"
            elif source == "python":
                words, terms = _PYTHON_LICENSE, "PSF-2.0"
            else:
                # A file's path says things about a machine that a card should not.
                words = source if not source.startswith(("/", "~", ".")) else source.split("/")[-1]
                terms = known.get("license") or "see its source"
            what = ", ".join(
                f"{known[key]:,} {name}"
                for key, name in (
                    ("kept", "answers"),
                    ("documents", "documents"),
                    ("completion_tokens", "tokens"),
                )
                if isinstance(known.get(key), int)
            )
            rows.append({"stage": stage, "source": words, "read": what, "license": terms})
    return rows


__all__ = [
    "OpenVINOCopy",
    "best_num_assistant_tokens",
    "best_of_paths",
    "describe_machine",
    "render_card",
    "template_path",
]
