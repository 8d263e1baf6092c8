"""The card of a measured draft, filled from its run's records."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fastdraft_hf._card import fill_card, markdown, python
from fastdraft_hf._errors import FastDraftError, redacted
from fastdraft_hf.eval.summary import (
    SPEED_NOTE,
    TRAINING_STAGES,
    RunSummary,
    acceptance_rows,
    budget_sentence,
    cut_sentence,
    greedy_sentence,
    held_out_sentence,
    kernel_rows,
    markdown_table,
    path_words,
    speed_rows,
    stage_rows,
    verdict,
)

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCard

# The id that a task set has on the Hub; a set of the user's own keeps its name.
_HUB_IDS = {
    "humaneval": "openai/openai_humaneval",
    "ifbench": "allenai/IFBench_test",
    "cnn_dailymail": "abisee/cnn_dailymail",
    "tinystories": "roneneldan/TinyStories",
    "dolly": "databricks/databricks-dolly-15k",
}


def best_of_paths(bench: dict[str, Any] | None, order: Sequence[str]) -> int | None:
    """Return the fastest γ through the first of ``order`` that was timed."""
    paths = bench["paths"] if bench else {}
    for path in order:
        if path in paths:
            return int(paths[path]["overall"]["best_num_assistant_tokens"])
    return None


def render_card(
    summary: RunSummary,
    facts: Mapping[str, Any],
    *,
    draft_location: str,
    openvino: str | None = None,
    datasets: Sequence[str] = (),
    weights_note: str = "",
) -> ModelCard:
    """Render the card.

    Args:
        summary: the run's records; stage evaluate must have run.
        facts: ``target`` and ``num_assistant_tokens``; ``model_name``, ``target_revision``,
            ``license``, ``base_model`` and ``language`` as far as they are known. Stage card
            records them.
        draft_location: what the snippets load the draft from.
        openvino: the draft's OpenVINO folder: a path, or its name (without ``/``) in the draft's
            repository.
        datasets: ids of the datasets it was trained on.
        weights_note: how the weights were changed after they were measured.

    Raises:
        FastDraftError: the run has no evaluation, or the metadata breaks a rule of the Hub.
    """
    evaluation, bench = summary.evaluation, summary.bench
    if evaluation is None:
        raise FastDraftError("a card needs the results of stage evaluate")
    settings = evaluation["settings"]
    design = summary.provenance.get("design", {}).get("facts", {})
    align = summary.provenance.get("align")
    objective = (align["facts"].get("objective") or {"ce": 1}) if align else ""
    if isinstance(objective, dict):
        objective = ", ".join(f"{weight:g} {term}" for term, weight in objective.items())
    gamma = int(facts["num_assistant_tokens"])
    card = fill_card(
        model_name=facts["model_name"],
        target_name=facts["target"],
        draft_location=draft_location,
        num_assistant_tokens=gamma,
        license=facts.get("license"),
        base_model=facts.get("base_model"),
        language=facts.get("language") or (),
        datasets=datasets,
        eval_results=[*_acceptance_results(evaluation), *_speed_results(bench)],
        measured=True,
        target_revision=markdown(facts.get("target_revision") or ""),
        draft_parameters=f"{evaluation['draft_parameters']:,}",
        target_parameters=f"{evaluation['target_parameters']:,}",
        size_ratio=f"{1 / evaluation['cost_ratio']:.1f}",
        headline=_headline(bench),
        weights_note=weights_note,
        gamma=" or ".join(dict.fromkeys(str(s["num_assistant_tokens"]) for s in settings)),
        tasks=markdown(", ".join(evaluation["tasks"])),
        not_held_out=held_out_sentence(evaluation),
        acceptance_table=markdown_table(acceptance_rows(evaluation)),
        greedy=greedy_sentence(evaluation),
        cut=" ".join(filter(None, [cut_sentence(evaluation), cut_sentence(bench)])),
        machine=markdown(_machines(summary)),
        kernels_table=markdown_table(kernel_rows(bench)) if bench else "",
        speed_table=_speed_table(bench) if bench else "",
        verdict=verdict(bench),
        stages_table=markdown_table(stage_rows(summary.provenance)),
        # The table of stages says what the draft was trained on before.
        design=markdown(", ".join(f"{k} {_plain(v)}" for k, v in design.items() if k != "earlier")),
        objective=markdown(objective),
        hours=f"{sum(r['wall_seconds'] for r in summary.provenance.values()) / 3600:.2f}",
        data_table=markdown_table(_data_rows(summary, facts.get("license"))),
        limits=budget_sentence(summary),
        provenance=True,
        openvino_folder=openvino.rpartition("/")[2] if openvino else None,
        openvino_python=python(openvino) if openvino and "/" in openvino else None,
        openvino_num_assistant_tokens=best_of_paths(bench, ("openvino", "ours-openvino")) or gamma,
    )
    card.text = redacted(card.text)
    return card


def _headline(bench: dict[str, Any] | None) -> str:
    """Say the speed-up of the fastest path over the target alone through the same kernels."""
    if not bench or not bench["paths"]:
        return ""
    best = bench["best"]
    name = f"{best['path']}/{best['draft']}" if best["draft"] else best["path"]
    overall = bench["paths"][name]["overall"]
    value, low, high = overall["judged"]["ratio"]
    words = (
        f"**{value:.2f}x** the speed of the target alone through the same kernels (95% interval "
        f"{low:.2f} to {high:.2f}; {path_words(name)}, γ = {overall['best_num_assistant_tokens']})."
    )
    stock = overall.get("stock")
    if stock:
        words += (
            "\n\nThe kernels of `fastdraft_hf` alone, without a draft: "
            f"{stock['kernels_ratio'][0]:.2f}x."
        )
    return words


def describe_machine(machine: dict[str, Any]) -> str:
    """Return a machine record as words."""
    words = f"{machine['cpu']}, {machine['cpu_count']} cores"
    if "gpu" in machine:
        words += f", {machine['gpu_count']} x {machine['gpu']}"
    return words


def _machines(summary: RunSummary) -> str:
    """Name the machine of the last stage, and the others where stages ran elsewhere."""
    found = [describe_machine(r["machine"]) for r in reversed(summary.provenance.values())]
    first, *others = dict.fromkeys(found) or ["unknown"]
    return f"{first} (other stages: {'; '.join(others)})" if others else first


def _plain(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _acceptance_results(evaluation: dict[str, Any]) -> list[EvalResult]:
    results = []
    for setting in evaluation["settings"]:
        if not setting["temperature"]:  # the paper's acceptance rate is of sampled text
            continue
        how = f"γ = {setting['num_assistant_tokens']}, T = {setting['temperature']:g}"
        for task, figures in setting["tasks"].items():
            for name, key in (
                ("Acceptance rate", "acceptance_rate"),
                ("Block efficiency", "block_efficiency"),
            ):
                if figures is not None:
                    results += _result(task, key, name, how, figures[key], 4)
    return results


def _speed_results(bench: dict[str, Any] | None) -> list[EvalResult]:
    """Return every path's speed-up over the target alone through the same kernels."""
    results = []
    for path, found in (bench["paths"] if bench else {}).items():
        for task, figures in found["tasks"].items():
            gamma = figures["best_num_assistant_tokens"]
            how = f"{path_words(path)}, greedy, γ = {gamma}, same kernels"
            results += _result(task, "speed_up", "Speed-up", how, figures["judged"]["ratio"], 3)
    return results


def _result(
    task: str, key: str, name: str, how: str, triple: Sequence[float], digits: int
) -> list[EvalResult]:
    """Return one entry of the model index, none for NaN; its name says the interval too."""
    from huggingface_hub import EvalResult

    if not all(math.isfinite(number) for number in triple):
        return []
    value, low, high = (round(number, digits) for number in triple)
    return [
        EvalResult(
            task_type="text-generation",
            task_name="Speculative decoding",
            dataset_type=_HUB_IDS.get(task) or re.sub(r"[^A-Za-z0-9_.-]+", "-", task) or "prompts",
            dataset_name=task,
            metric_type=key,
            metric_name=f"{name} ({how}; 95% {low:g} to {high:g})",
            metric_value=value,
            metric_args={"confidence_level": 0.95, "low": low, "high": high},
        )
    ]


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
                words = f"{source}: generated by the target"
                terms = f"the target's ({license})" if license else "the target's"
            elif source == "python":
                words, terms = "Python standard library", "PSF-2.0"
            else:
                # A file's path says things about a machine that a card should not.
                words = source if not source.startswith(("/", "~", ".")) else source.split("/")[-1]
                terms = known.get("license") or "see its source"
            read = ", ".join(
                f"{known[key]:,} {name}"
                for key, name in (
                    ("kept", "completions"),
                    ("documents", "documents"),
                    ("completion_tokens", "tokens"),
                )
                if isinstance(known.get(key), int)
            )
            row = {"stage": stage, "source": words, "read": read, "license": str(terms)}
            rows.append({key: markdown(value) for key, value in row.items()})
    return rows
