"""The card of a measured draft, filled from its run's records."""

import json
import math
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from fastdraft_hf._card import (
    CARD,
    LICENSES,
    TAGS,
    is_model_id,
    markdown,
    python,
)
from fastdraft_hf._errors import FastDraftError, redacted
from fastdraft_hf.data.task_sets import HUB_SETS
from fastdraft_hf.eval.summary import (
    SPEED_NOTE,
    TRAINING_STAGES,
    RunSummary,
    acceptance_rows,
    acceptance_sentences,
    budget_sentence,
    cut_sentence,
    markdown_table,
    speed_rows,
    stage_rows,
    verdict,
)

# The id that a task set has on the Hub; a set of the user's own keeps its name.
_HUB_IDS = {name: task.dataset for name, task in HUB_SETS.items()}
_HUB_IDS |= {"humaneval": "openai/openai_humaneval", "ifbench": "allenai/IFBench_test"}


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
    weights_note: str = "",
) -> ModelCard:
    """Render the card.

    Args:
        summary: the run's records; stage evaluate must have run.
        facts: ``target`` and ``num_assistant_tokens``; ``model_name``, ``target_revision``,
            ``license``, ``base_model``, ``language`` and ``parallel_drafting`` as far as they are
            known. Stage card records them. A license that the Hub does not know becomes ``other``
            with a link to the target's page.
        draft_location: what the snippets load the draft from.
        openvino: the draft's OpenVINO folder: a path, or its name (without ``/``) in the draft's
            repository.
        weights_note: how the weights were changed after they were measured.

    Raises:
        FastDraftError: the run has no evaluation, or a name holds a control character such as a
            line break.
    """
    evaluation, bench = summary.evaluation, summary.bench
    if evaluation is None:
        raise FastDraftError("a card needs the results of stage evaluate")
    target, license = facts.get("base_model") or facts["target"], facts.get("license")
    names = {"model_name": facts["model_name"], "target": target, "draft": draft_location}
    for what, name in names.items():
        if not name.isprintable():
            raise FastDraftError(f"{CARD}: {what}: {name!r} holds a control character; rename it")
    is_id = is_model_id(target, owner=True)
    # No `base_model_relation`: the Hub knows finetune, adapter, quantized and merge, and a draft is
    # none of them.
    data = ModelCardData(
        model_name=facts["model_name"],
        # A folder's name is not an id: the Hub would link to another model, or to none.
        base_model=target if is_id else None,
        license=license if license is None or license in LICENSES else "other",
        language=list(facts.get("language") or ()) or None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=TAGS,
        eval_results=_results(evaluation, bench) or None,
    )
    if data.license == "other":
        own = license if license != "other" else f"{target.split('/')[-1].lower()}-license"
        data.license_name = re.sub(r"[^a-z0-9.-]+", "-", str(own).lower())
        data.license_link = f"https://huggingface.co/{target}" if is_id else "LICENSE"
    design = summary.provenance.get("design", {}).get("facts", {})
    align = summary.provenance.get("align")
    objective = (align["facts"].get("objective") or {"ce": 1}) if align else ""
    if isinstance(objective, dict):
        objective = ", ".join(f"{weight:g} {term}" for term, weight in objective.items())
    kwargs = summary.provenance.get("generate", {}).get("chat_template_kwargs")
    gamma = int(facts["num_assistant_tokens"])
    speculative: dict[str, Any] = {
        "method": "draft_model",
        "model": draft_location,
        "num_speculative_tokens": gamma,
    }
    if facts.get("parallel_drafting"):
        speculative["parallel_drafting"] = True
    packaged = Path(__file__).with_name("template.md")  # a checkout has it in model_cards/
    checkout = Path(__file__).resolve().parents[2] / "model_cards" / "template.md"
    template = packaged if packaged.exists() else checkout
    drafted = (str(setting["num_assistant_tokens"]) for setting in evaluation["settings"])
    card = ModelCard.from_template(
        data,
        template_str=template.read_text(encoding="utf-8"),
        heading=markdown(facts["model_name"]),
        target_link=f"[{target}](https://huggingface.co/{target})" if is_id else markdown(target),
        target_python=python(target),
        draft_python=python(draft_location),
        target_shell=shlex.quote(target),
        draft_shell=shlex.quote(draft_location),
        speculative_config=shlex.quote(json.dumps(speculative, ensure_ascii=False)),
        license_line=f"{markdown(license)}." if license else "Follows the target's license.",
        num_assistant_tokens=gamma,
        parallel_drafting=facts.get("parallel_drafting"),
        head=summary.provenance.get("reduced_vocabulary", {}).get("facts"),
        target_revision=markdown(facts.get("target_revision") or ""),
        draft_parameters=f"{evaluation['draft_parameters']:,}",
        target_parameters=f"{evaluation['target_parameters']:,}",
        size_ratio=f"{1 / evaluation['cost_ratio']:.1f}",
        verdict=verdict(bench),
        weights_note=weights_note,
        gamma=" or ".join(dict.fromkeys(drafted)),
        tasks=markdown(", ".join(evaluation["tasks"])),
        acceptance_table=markdown_table(acceptance_rows(evaluation)),
        sentences=" ".join(acceptance_sentences(evaluation)),
        machine=markdown(_machines(summary)),
        speed_table=markdown_table(speed_rows(bench)) if bench else "",
        speed_note=" ".join(filter(None, (SPEED_NOTE, cut_sentence(bench)))),
        stages_table=markdown_table(stage_rows(summary.provenance)),
        # The table of stages says what the draft was trained on before.
        design=markdown(", ".join(f"{k} {_plain(v)}" for k, v in design.items() if k != "earlier")),
        objective=markdown(objective),
        aligned=align is not None or "earlier" in design,
        chat_template_kwargs=json.dumps(kwargs, ensure_ascii=False) if kwargs else "",
        hours=f"{sum(r['wall_seconds'] for r in summary.provenance.values()) / 3600:.2f}",
        data_table=markdown_table(_data_rows(summary, license)),
        limits=budget_sentence(summary),
        openvino_folder=openvino.rpartition("/")[2] if openvino else None,
        openvino_python=python(openvino) if openvino and "/" in openvino else None,
        openvino_num_assistant_tokens=best_of_paths(bench, ("openvino", "ours-openvino")) or gamma,
    )
    card.text = redacted(card.text)
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
    first, *others = dict.fromkeys(found) or ["unknown"]
    return f"{first} (other stages: {'; '.join(others)})" if others else first


def _plain(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _results(evaluation: dict[str, Any], bench: dict[str, Any] | None) -> list[EvalResult]:
    """Return the model index; each name says the interval too."""
    found: list[tuple[str, str, str, list[float]]] = []
    for setting in evaluation["settings"]:
        if not setting["temperature"]:  # the paper's acceptance rate is of sampled text
            continue
        how = f"γ = {setting['num_assistant_tokens']}, T = {setting['temperature']:g}"
        for task, figures in setting["tasks"].items():
            for key in ("acceptance_rate", "block_efficiency") if figures else ():
                name = key.replace("_", " ").capitalize()
                found.append((task, key, f"{name} ({how}", figures[key]))
    for path, timed in (bench["paths"] if bench else {}).items():
        for task, figures in timed["tasks"].items():
            how = f"{path}, greedy, γ = {figures['best_num_assistant_tokens']}"
            name = f"Speed-up ({how}, same kernels"
            found.append((task, "speed_up", name, figures["judged"]["ratio"]))
    return [
        EvalResult(
            task_type="text-generation",
            task_name="Speculative decoding",
            dataset_type=_HUB_IDS.get(task) or re.sub(r"[^A-Za-z0-9_.-]+", "-", task) or "prompts",
            dataset_name=task,
            metric_type=key,
            metric_name=f"{name}; 95% {low:g} to {high:g})",
            metric_value=value,
            metric_args={"confidence_level": 0.95, "low": low, "high": high},
        )
        for task, key, name, triple in found
        for value, low, high in [[round(number, 4) for number in triple]]
        if math.isfinite(value + low + high)
    ]


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
