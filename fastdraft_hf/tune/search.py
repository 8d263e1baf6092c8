"""Search for the best draft shape and γ: design, time, predict, choose.

The folder keeps everything, and the next run resumes from it: untrained drafts (``designs/``),
their OpenVINO exports (``openvino-<format>/``), ``timings.json`` by design and repeat,
``probes.json``. ``results.json`` is written each time.
"""

from __future__ import annotations

import hashlib
import json
import logging
import random
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastdraft_hf._atomic import atomic_folder, write_json
from fastdraft_hf._errors import FastDraftError
from fastdraft_hf._progress import Progress
from fastdraft_hf.draft.config import DesignConfig
from fastdraft_hf.eval.metrics import acceptance_of_rate, expected_block_efficiency
from fastdraft_hf.tune.config import TuneConfig
from fastdraft_hf.tune.grid import Design, designs_of
from fastdraft_hf.tune.timing import LoopTimer, median_and_quartiles

if TYPE_CHECKING:
    from fastdraft_hf.target.resolve import Target

logger = logging.getLogger(__name__)

# Used for all designs where neither an acceptance nor a probe is given.
DEFAULT_ACCEPTANCE = 0.4
# Settings that change no timing.
_NOT_TIMED = {"acceptance", "probe_tokens", "rows", "repeats", "depths", "widths_per_depth"}
_NOT_TIMED |= {"width_multiple", "params"}


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
    from transformers import AutoConfig

    target_config = AutoConfig.from_pretrained(target.path)
    _check(config, target_config.get_text_config())
    gammas = list(range(1, config.max_num_assistant_tokens + 1))
    designs = designs_of(target_config, config)
    probes, efficiencies = None, dict[str, dict[int, float]]()
    if config.probe_tokens:
        from fastdraft_hf.tune.probe import Probes

        probes = Probes(config, target, folder, gammas)
    else:
        efficiencies = assumed_efficiencies(config, designs)
    logger.info("tune: %d designs of %s parameters", len(designs), f"{config.params:,}")
    seconds = _time(config, target, designs, folder, gammas)
    if probes is not None:
        efficiencies = probes(designs)
    results = {"target": target.name, **results_of(config, designs, seconds, efficiencies)}
    write_json(folder / "results.json", results)
    return results


def _check(config: TuneConfig, text: Any) -> None:
    gammas = range(1, config.max_num_assistant_tokens + 1)
    reach = config.context + (config.rounds + 1) * sum(g + 1 for g in gammas) + 64
    if reach > text.max_position_embeddings:
        raise FastDraftError(
            f"context: timing from {config.context} tokens reads up to {reach}, and the target "
            f"reads {text.max_position_embeddings}; lower context or rounds"
        )
    if config.measure == "openvino":
        from fastdraft_hf.export.openvino import require_openvino

        require_openvino()
    if config.measure == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise FastDraftError("measure: cuda, but PyTorch finds no GPU here")


def assumed_efficiencies(config: TuneConfig, designs: list[Design]) -> dict[str, dict[int, float]]:
    """Return design -> γ -> block efficiency at the acceptance that the settings give."""
    given = config.acceptance
    if not isinstance(given, dict):
        alpha = DEFAULT_ACCEPTANCE if given is None else given
        given = {str(d.layers): alpha for d in designs}
    depths = {str(d.layers) for d in designs}
    if given.keys() != depths:
        wrong = ", ".join(sorted(given.keys() ^ depths))
        raise FastDraftError(f"acceptance: needs one number for each depth tried; see {wrong}")
    gammas = range(1, config.max_num_assistant_tokens + 1)
    return {
        d.name: {g: expected_block_efficiency(given[str(d.layers)], g) for g in gammas}
        for d in designs
    }


def _time(
    config: TuneConfig,
    target: Target,
    designs: list[Design],
    folder: Path,
    gammas: list[int],
) -> dict[str, dict[int, list[float]]]:
    """Return design -> γ -> seconds of all rounds; designs are timed in random order."""
    facts = config.model_dump(exclude=_NOT_TIMED)
    facts |= {"target": str(target.path.resolve()), "revision": target.revision}
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]
    path = folder / "timings.json"
    saved: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    def label(design: Design, repeat: int) -> str:
        return f"{key}/{design.name}/{design.feed_forward}/{repeat}"

    rng = random.Random(config.seed)
    order = [(d, r) for r in range(config.repeats) for d in rng.sample(designs, len(designs))]
    due = [(d, r) for d, r in order if label(d, r) not in saved]
    if due:
        drafts = dict(zip(designs, _drafts(config, target, designs, folder), strict=True))
        timer = _loop_timer(config, target, gammas)
        with Progress("tune timing", len(order), "drafts", done=len(order) - len(due)) as progress:
            for design, repeat in due:
                saved[label(design, repeat)] = timer.measure(drafts[design], repeat)
                write_json(path, saved)
                progress.advance(1)
    else:
        logger.info("tune: uses the timings of an earlier run; delete %s to time again", path)
    found: dict[str, dict[int, list[float]]] = {d.name: {} for d in designs}
    for design, repeat in order:
        for gamma, times in saved[label(design, repeat)].items():
            found[design.name].setdefault(int(gamma), []).extend(times)
    return found


def _drafts(config: TuneConfig, target: Target, designs: list[Design], folder: Path) -> list[Path]:
    """Write an untrained draft of every design, and export it where OpenVINO is timed."""
    from fastdraft_hf.draft.build import build, save_draft

    paths = [folder / "designs" / f"{d.name}x{d.feed_forward}" for d in designs]
    for design, path in zip(designs, paths, strict=True):
        if not path.exists():
            section = DesignConfig(**{**design.section(config), "init": "scratch"})
            model, _ = build(target.path, section, config.seed)
            with atomic_folder(path) as temporary:
                save_draft(model, temporary)
    if config.measure != "openvino":
        return paths
    from fastdraft_hf.export.openvino import export_several

    exports = [folder / f"openvino-{config.weight_format}" / path.name for path in paths]
    with Progress("tune export", len(designs), "drafts") as progress:
        jobs = [(*pair, config.weight_format) for pair in zip(paths, exports, strict=True)]
        export_several(jobs, progress.advance)
    return exports


def _loop_timer(config: TuneConfig, target: Target, gammas: list[int]) -> LoopTimer:
    path = target.path
    if config.measure == "openvino":
        from fastdraft_hf.export.openvino import cached_openvino

        logger.info("tune: exporting the target to OpenVINO %s (once)", config.weight_format)
        path = cached_openvino(path, config.weight_format)
    return LoopTimer(path, config.measure, gammas, config.context, config.rounds, config.seed)


def results_of(
    config: TuneConfig,
    designs: list[Design],
    seconds: Mapping[str, Mapping[int, list[float]]],
    efficiencies: Mapping[str, Mapping[int, float]],
) -> dict[str, Any]:
    """Return the times and predicted speeds of every design, and the best one."""
    rows: list[dict[str, Any]] = []
    speeds: dict[tuple[Design, int], float] = {}
    for design in designs:
        times = {g: median_and_quartiles(found) for g, found in seconds[design.name].items()}
        first, last = min(times), max(times)
        each = (times[last][0] - times[first][0]) / max(last - first, 1)
        tokens = efficiencies[design.name]
        # Of a probe, the acceptance that its largest γ shows.
        alpha = round(acceptance_of_rate((tokens[last] - 1) / last, last), 9)
        predicted = {g: tokens[g] / t[0] for g, t in times.items()}
        speeds |= {(design, g): speed for g, speed in predicted.items()}
        rows.append(
            {
                "design": design.name,
                **asdict(design),
                "drafted_token_seconds": each,
                "round_seconds": {str(g): [*t] for g, t in times.items()},
                "acceptance": alpha,
                "tokens_per_second": {str(g): speed for g, speed in predicted.items()},
            }
        )
    best, gamma = max(speeds, key=lambda one: speeds[one])
    return {
        "settings": config.model_dump(),
        "designs": rows,
        "best": {
            "design": best.name,
            "num_assistant_tokens": gamma,
            "tokens_per_second": speeds[best, gamma],
            "acceptance": next(r["acceptance"] for r in rows if r["design"] == best.name),
            "section": best.section(config),
        },
    }


def table(results: dict[str, Any]) -> list[dict[str, str]]:
    """Return a row for each design: its shape, round times, best γ and speed."""
    rows = []
    for found in results["designs"]:
        speeds = found["tokens_per_second"]
        gamma = max(speeds, key=lambda g: speeds[g])
        middle, low, high = (1e3 * value for value in found["round_seconds"][gamma])
        rows.append(
            {
                "": "→" if found["design"] == results["best"]["design"] else "",
                "design": found["design"],
                "feed-forward": f"{found['feed_forward']:,}",
                "parameters": f"{found['params'] / 1e6:.2f}M",
                "drafted token, ms": f"{1e3 * found['drafted_token_seconds']:.2f}",
                "acceptance": f"{found['acceptance']:.3f}",
                "best γ": gamma,
                "its round, ms": f"{middle:.2f} ({low:.2f} to {high:.2f})",
                "predicted tokens/s": f"{speeds[gamma]:.1f}",
            }
        )
    return rows


def verdict(results: dict[str, Any]) -> list[str]:
    """Return the conclusions as sentences."""
    best = results["best"]
    lines = [
        f"best at acceptance {best['acceptance']:.3f}: design {best['design']}, γ = "
        f"{best['num_assistant_tokens']}, {best['tokens_per_second']:.1f} tokens/s predicted"
    ]
    if results["settings"]["probe_tokens"]:
        lines.append("Acceptances are of short trainings; a full one reaches more.")
    elif len({row["acceptance"] for row in results["designs"]}) == 1:
        lines.append(
            "One acceptance for all designs: the cheapest draft wins. Deeper drafts have a higher "
            "acceptance rate; give acceptance by depth, or probe_tokens, to compare depths."
        )
    return lines


def recipe_snippet(results: dict[str, Any]) -> str:
    """Return the sections of a recipe with the best design, and γ around the best to bench."""
    import yaml

    gamma = results["best"]["num_assistant_tokens"]
    near = [g for g in (gamma - 1, gamma, gamma + 1) if g >= 1]
    sections = {"design": results["best"]["section"], "bench": {"num_assistant_tokens": near}}
    return str(yaml.safe_dump(sections, sort_keys=False, default_flow_style=None))


def draw(results: dict[str, Any], path: Path) -> None:
    """Write a PNG: predicted speed over depth and over γ, and a drafted token's time by depth."""
    from matplotlib.figure import Figure

    rows = results["designs"]
    figure = Figure(figsize=(14, 4), dpi=120, layout="constrained")
    depth, gamma, latency = figure.subplots(1, 3)
    tops = {row["design"]: max(row["tokens_per_second"].values()) for row in rows}
    depths = sorted({row["layers"] for row in rows})
    best = [max(tops[row["design"]] for row in rows if row["layers"] == n) for n in depths]
    depth.plot(depths, best, "-o", ms=4)
    depth.set(xlabel="layers, at one parameter budget", ylabel="tokens/s, predicted")
    for row in sorted(rows, key=lambda row: -tops[row["design"]])[:10]:
        speeds = {int(g): speed for g, speed in row["tokens_per_second"].items()}
        label = f"{row['design']}, α {row['acceptance']:.2f}"
        gamma.plot([*speeds], [*speeds.values()], "-o", ms=3, lw=1.2, label=label)
    gamma.set(xlabel="drafted tokens per round (γ)", ylabel="tokens/s, predicted")
    gamma.legend(fontsize=7, frameon=False)
    times = [1e3 * row["drafted_token_seconds"] for row in rows]
    latency.plot([row["layers"] for row in rows], times, "o", ms=4)
    for row, time in zip(rows, times, strict=True):
        offset = {"xytext": (4, 4), "textcoords": "offset points", "fontsize": 7}
        latency.annotate(str(row["width"]), (row["layers"], time), **offset)
    latency.set(xlabel="layers (at each point: width)", ylabel="a drafted token, ms")
    for axes in (depth, gamma, latency):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
