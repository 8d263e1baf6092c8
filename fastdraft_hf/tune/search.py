"""Search for the best draft shape and γ: design, time, predict, choose.

The folder keeps everything, and the next run resumes from it: untrained drafts (``designs/``),
their OpenVINO exports (``openvino-int8/``), ``timings.json`` by design and repeat, ``probes/``.
``results.json`` is written each time.
"""

import hashlib
import json
import logging
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from transformers import PretrainedConfig

from fastdraft_hf._atomic import atomic_folder, read_json, write_json
from fastdraft_hf._errors import FastDraftError
from fastdraft_hf._progress import Progress
from fastdraft_hf.draft.build import build, save_draft
from fastdraft_hf.draft.config import DesignConfig
from fastdraft_hf.draft.design import design_draft
from fastdraft_hf.draft.families import count_parameters
from fastdraft_hf.eval.metrics import acceptance_of_rate, expected_block_efficiency
from fastdraft_hf.export.openvino import cached_openvino, export_openvino, require_openvino
from fastdraft_hf.target.resolve import Target, load_config
from fastdraft_hf.tune.config import TuneConfig
from fastdraft_hf.tune.probe import Probes
from fastdraft_hf.tune.timing import LoopTimer

logger = logging.getLogger(__name__)

DEPTHS = (1, 2, 4, 8, 12)
# Feed-forward sizes as multiples of the width. A shallow draft of a small budget needs far more
# than the usual 2 to 8 to fill it.
NARROWEST, WIDEST = 1, 24
# Widths and feed-forward sizes are multiples of these.
_WIDTH_STEP, _STEP = 16, 8
# How far a design may miss the budget. Those cut from the target have feed-forward layers no wider
# than the target's and miss it by more.
_TOLERANCE, _CUT_TOLERANCE = 0.02, 0.1


def search(config: TuneConfig, target: Target, folder: Path) -> dict[str, Any]:
    """Return the best design and γ on this machine, and all measurements.

    Args:
        config: what is searched, and how.
        target: the model to draft for.
        folder: keeps everything; what a killed run finished is not measured again.

    Returns:
        the content of ``results.json``; see docs/search.md.

    Raises:
        FastDraftError: a setting is impossible; raised before any work.
    """
    target_config = load_config(target.path, "target")
    gammas = list(range(1, config.max_num_assistant_tokens + 1))
    reads = target_config.get_text_config().max_position_embeddings
    reach = config.context + (config.rounds + 1) * sum(g + 1 for g in gammas) + 64
    if reach > reads:
        raise FastDraftError(
            f"context: timing from {config.context} tokens reads up to {reach}, and the target "
            f"reads {reads}; lower context or rounds"
        )
    if config.measure == "openvino":
        require_openvino()
    if config.measure == "cuda" and not torch.cuda.is_available():
        raise FastDraftError("measure: cuda, but PyTorch finds no GPU here")
    designs = designs_of(target_config, config)
    if config.probe_tokens:
        probes = Probes(config, target, folder, gammas)
    else:
        efficiencies = assumed_efficiencies(config, designs, gammas)
    seconds = _time(config, target, designs, folder, gammas)
    if config.probe_tokens:
        efficiencies = probes(designs)
    results = {"target": target.name, **results_of(config, designs, seconds, efficiencies)}
    write_json(folder / "results.json", results)
    return results


def designs_of(target: PretrainedConfig, config: TuneConfig) -> dict[str, DesignConfig]:
    """Return the shapes to time, by depth and then from wide to narrow, as ``2x192x1152``.

    Raises:
        FastDraftError: a requested depth is impossible, or nothing fits the budget.
    """
    text = target.get_text_config()
    found: list[DesignConfig] = []
    depths = config.depths or [d for d in DEPTHS if d <= text.num_hidden_layers]
    for depth in dict.fromkeys(depths):
        if depth > text.num_hidden_layers:
            raise FastDraftError(
                f"depths: {depth} is deeper than the target's {text.num_hidden_layers} layers"
            )
        widths = range(_WIDTH_STEP, text.hidden_size + 1, _WIDTH_STEP)
        filled = [_filled(target, config, depth, width) for width in reversed(widths)]
        fitting = [design for design in filled if design is not None]
        if not fitting and config.depths is not None:
            raise FastDraftError(
                f"depths: no draft of {depth} layers fills {config.params:,} parameters with "
                f"feed-forward layers of {NARROWEST} to {WIDEST} times its width"
            )
        # Evenly spaced, the widest and the narrowest included.
        count = min(config.widths_per_depth, len(fitting))
        found += [fitting[n * (len(fitting) - 1) // max(count - 1, 1)] for n in range(count)]
    if not found:
        # The design's own message names the smallest budget.
        design_draft(target, DesignConfig(params=config.params, init=config.init))
        raise FastDraftError(f"params: no draft of {config.params:,} parameters can be designed")
    return {f"{d.num_hidden_layers}x{d.hidden_size}x{d.intermediate_size}": d for d in found}


def _filled(target: Any, config: TuneConfig, depth: int, width: int) -> DesignConfig | None:
    """Return the design of this depth and width that fills the budget, or ``None``."""
    text, budget = target.get_text_config(), config.params
    widest = WIDEST * width if config.init != "prune" else text.intermediate_size
    given: dict[str, Any] = {"num_hidden_layers": depth, "hidden_size": width, "init": config.init}

    def design(inner: int) -> DesignConfig:
        return DesignConfig(params=budget, intermediate_size=inner, **given)

    def params(inner: int) -> int:
        return count_parameters(design_draft(target, design(inner)))

    try:
        least = params(_STEP)
        step = params(2 * _STEP) - least
    except FastDraftError:  # this family has no such width
        return None
    inner = min(_STEP * (1 + (budget - least) // step), widest)
    if not NARROWEST * width <= inner <= WIDEST * width:
        return None
    tolerance = _TOLERANCE if config.init != "prune" else _CUT_TOLERANCE
    return design(inner) if abs(params(inner) - budget) <= tolerance * budget else None


def assumed_efficiencies(
    config: TuneConfig, designs: Mapping[str, DesignConfig], gammas: list[int]
) -> dict[str, dict[int, float]]:
    """Return design -> γ -> block efficiency at the acceptance that the settings give."""
    given, depths = config.acceptance, {str(d.num_hidden_layers) for d in designs.values()}
    if not isinstance(given, dict):
        given = dict.fromkeys(depths, given)
    if given.keys() != depths:
        wrong = ", ".join(sorted(given.keys() ^ depths))
        raise FastDraftError(f"acceptance: needs one number for each depth tried; see {wrong}")
    alphas = {name: given[str(design.num_hidden_layers)] for name, design in designs.items()}
    return {n: {g: expected_block_efficiency(a, g) for g in gammas} for n, a in alphas.items()}


def _time(
    config: TuneConfig,
    target: Target,
    designs: Mapping[str, DesignConfig],
    folder: Path,
    gammas: list[int],
) -> dict[str, dict[int, list[float]]]:
    """Return design -> γ -> seconds of all rounds; designs are timed in random order."""
    facts = (str(target.path.resolve()), config.measure, gammas, config.context, config.rounds)
    key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:12]
    timings, rng, saved = folder / "timings.json", random.Random(0), dict[str, Any]()
    if timings.exists():
        saved = read_json(timings)
    order = [
        (name, repeat, f"{key}/{name}/{repeat}")
        for repeat in range(config.repeats)
        for name in rng.sample(list(designs), len(designs))
    ]
    due = [one for one in order if one[2] not in saved]
    if due:
        drafts = _drafts(config, target, designs, folder)
        openvino = config.measure == "openvino"
        path = cached_openvino(target.path, "int8") if openvino else target.path
        timer = LoopTimer(path, config.measure, gammas, config.context, config.rounds)
        with Progress("tune timing", len(order), "drafts", done=len(order) - len(due)) as progress:
            for name, repeat, label in due:
                saved[label] = timer.measure(drafts[name], repeat)
                write_json(timings, saved)
                progress.advance(1)
    found: dict[str, dict[int, list[float]]] = {name: {g: [] for g in gammas} for name in designs}
    for name, _, label in order:
        for gamma, times in saved[label].items():
            found[name][int(gamma)] += times
    return found


def _drafts(
    config: TuneConfig, target: Target, designs: Mapping[str, DesignConfig], folder: Path
) -> dict[str, Path]:
    """Write an untrained draft of every design, and export it where OpenVINO is timed."""
    paths = {name: folder / "designs" / name for name in designs}
    for name, path in paths.items():
        if not path.exists():
            untrained = designs[name].model_copy(update={"init": "scratch"})
            with atomic_folder(path) as temporary:
                save_draft(build(target.path, untrained, 0)[0], temporary)
    if config.measure != "openvino":
        return paths
    exports = {name: folder / "openvino-int8" / name for name in designs}
    logger.info("tune: exporting %d drafts to OpenVINO int8", len(designs))
    export_openvino(*((paths[name], exports[name], "int8") for name in designs))
    return exports


def results_of(
    config: TuneConfig,
    designs: Mapping[str, DesignConfig],
    seconds: Mapping[str, Mapping[int, list[float]]],
    efficiencies: Mapping[str, Mapping[int, float]],
) -> dict[str, Any]:
    """Return the times and predicted speeds of every design, and the best one."""
    rows: list[dict[str, Any]] = []
    for name, design in designs.items():
        tokens, rounds = efficiencies[name], seconds[name]
        times = {g: np.quantile(rounds[g], (0.5, 0.25, 0.75)).tolist() for g in rounds}
        speeds = {g: tokens[g] / times[g][0] for g in times}
        last, best = max(times), max(speeds, key=lambda gamma: speeds[gamma])
        rows.append(
            {
                "design": name,
                "round_seconds": {str(g): found for g, found in times.items()},
                # Of a probe, the acceptance that its largest γ shows.
                "acceptance": round(acceptance_of_rate((tokens[last] - 1) / last, last), 9),
                "tokens_per_second": {str(g): speed for g, speed in speeds.items()},
                "best": {"num_assistant_tokens": best, "tokens_per_second": speeds[best]},
                "section": design.model_dump(exclude_unset=True),
            }
        )
    top = max(rows, key=lambda row: row["best"]["tokens_per_second"])
    best_of_all = {**top["best"], **{key: top[key] for key in ("design", "acceptance", "section")}}
    return {"settings": config.model_dump(), "designs": rows, "best": best_of_all}


def table(results: dict[str, Any]) -> list[dict[str, str]]:
    """Return a row for each design: its shape, round times, best γ and speed."""
    rows = []
    for found in results["designs"]:
        best = found["best"]
        gamma = str(best["num_assistant_tokens"])
        middle, low, high = (1e3 * value for value in found["round_seconds"][gamma])
        rows.append(
            {
                "": "→" if found["design"] == results["best"]["design"] else "",
                "design": found["design"],
                "acceptance": f"{found['acceptance']:.3f}",
                "best γ": gamma,
                "its round, ms": f"{middle:.2f} ({low:.2f} to {high:.2f})",
                "predicted tokens/s": f"{best['tokens_per_second']:.1f}",
            }
        )
    return rows


def verdict(results: dict[str, Any]) -> str:
    """Return the conclusion as sentences."""
    best = results["best"]
    said = (
        f"best at acceptance {best['acceptance']:.3f}: design {best['design']}, γ = "
        f"{best['num_assistant_tokens']}, {best['tokens_per_second']:.1f} tokens/s predicted"
    )
    if results["settings"]["probe_tokens"]:
        return f"{said}\nAcceptances are of short trainings; a full one reaches more."
    if len({row["acceptance"] for row in results["designs"]}) == 1:
        return (
            f"{said}\nOne acceptance for all designs: the cheapest draft wins. Deeper drafts have "
            "a higher one; give acceptance by depth, or probe_tokens, to compare depths."
        )
    return said


def recipe_snippet(results: dict[str, Any]) -> str:
    """Return the sections of a recipe with the best design, and γ around the best to bench."""
    gamma = results["best"]["num_assistant_tokens"]
    near = [g for g in (gamma - 1, gamma, gamma + 1) if g >= 1]
    sections = {"design": results["best"]["section"], "bench": {"num_assistant_tokens": near}}
    return str(yaml.safe_dump(sections, sort_keys=False, default_flow_style=None))
