"""The model card, filled from the run's own records."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastdraft_hf.evaluation.summary import (
    SPEED_NOTE,
    TRAINING_STAGES,
    RunSummary,
    acceptance_rows,
    budget_sentence,
    held_out_sentence,
    markdown_table,
    settings_of,
    speed_rows,
    stage_rows,
    verdict,
)

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCard

# What a licence of a corpus is called on a card; the target's text carries the target's licence.
_PYTHON_LICENCE = "Python standard library (PSF-2.0)"


def template_path() -> Path:
    """Return the card's template: packed beside this file, or in the checkout's model_cards/."""
    packed = Path(__file__).with_name("template.md")
    if packed.exists():
        return packed
    return Path(__file__).resolve().parents[2] / "model_cards" / "template.md"


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
    licence: str | None,
    draft_location: str,
    num_assistant_tokens: int,
) -> ModelCard:
    """Render the card.

    Args:
        summary: the run's records; stage evaluate must have run.
        model_name: the heading.
        target_name: the target's model id.
        target_revision: its commit or file digest, when known.
        licence: licence identifier of the draft.
        draft_location: where the snippet loads the draft from.
        num_assistant_tokens: γ that the draft's generation config holds.
    """
    from huggingface_hub import ModelCard, ModelCardData

    evaluation = summary.evaluation
    if evaluation is None:
        raise ValueError("a card needs the results of stage evaluate")
    data = ModelCardData(
        model_name=model_name,
        base_model=target_name,
        license=licence,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["fastdraft", "speculative-decoding", "draft-model", "assisted-generation"],
        eval_results=_eval_results(evaluation),
    )
    settings = settings_of(evaluation)
    machine = next(iter(reversed(summary.provenance.values())))["machine"]
    design = summary.provenance.get("design", {}).get("facts", {})
    return ModelCard.from_template(
        data,
        template_path=str(template_path()),
        model_name=model_name,
        target_name=target_name,
        target_revision=target_revision,
        draft_parameters=f"{evaluation['draft_parameters']:,}",
        target_parameters=f"{evaluation['target_parameters']:,}",
        size_ratio=f"{1 / evaluation['cost_ratio']:.1f}",
        draft_location=draft_location,
        num_assistant_tokens=num_assistant_tokens,
        gamma=" or ".join(
            str(g) for g in dict.fromkeys(s["num_assistant_tokens"] for s in settings)
        ),
        tasks=", ".join(evaluation["tasks"]),
        not_held_out=held_out_sentence(evaluation),
        acceptance_table=markdown_table(acceptance_rows(evaluation)),
        greedy_identical=evaluation["greedy_identical"],
        greedy_prompts=evaluation["greedy_prompts"],
        machine=describe_machine(machine),
        speed_table=_speed_table(summary.bench) if summary.bench else "",
        verdict=verdict(summary.bench),
        stages_table=markdown_table(stage_rows(summary.provenance)),
        design=", ".join(f"{key} {value}" for key, value in design.items()),
        data=_describe_data(summary),
        limits=budget_sentence(summary),
        licence_line=f"{licence}." if licence else "Follows the target's licence.",
    )


def describe_machine(machine: dict[str, Any]) -> str:
    """Return a machine record as words."""
    words = f"{machine['cpu']}, {machine['cpu_count']} cores"
    if "gpu" in machine:
        words += f", {machine['gpu_count']} x {machine['gpu']}"
    return words


def _eval_results(evaluation: dict[str, Any]) -> list[EvalResult]:
    from huggingface_hub import EvalResult

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
                results.append(
                    EvalResult(
                        task_type="text-generation",
                        task_name="Speculative decoding",
                        dataset_type=task,
                        dataset_name=task,
                        metric_type=key,
                        metric_name=f"{name} (γ = {gamma}, T = {temperature:g})",
                        metric_value=round(figures[key][0], 4),
                    )
                )
    return results


def _speed_table(bench: dict[str, Any]) -> str:
    table = markdown_table(speed_rows(bench))
    return f"{table}\n\n{SPEED_NOTE}" if bench.get("best") else table


def _describe_data(summary: RunSummary) -> str:
    kinds = set()
    for stage in TRAINING_STAGES:
        facts = summary.provenance.get(stage, {}).get("facts", {})
        kinds |= set(facts.get("data", {}).get("sources", {}))
    generated = set(summary.provenance.get("generate", {}).get("facts", {}).get("sets", {}))
    parts = []
    if kinds & generated:
        parts.append("text the target wrote itself")
    if "python" in kinds:
        parts.append(_PYTHON_LICENCE)
    parts += sorted(kinds - generated - {"python"})
    return ", ".join(parts) or "none"
