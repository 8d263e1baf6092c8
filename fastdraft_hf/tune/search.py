"""The search: design, time, predict, choose.

Everything lies in one folder and is taken up again by the next run: the untrained drafts
(``designs/``), their OpenVINO exports (``openvino-<format>/``), ``timings.json`` by design and
repeat, ``probes.json``; ``results.json`` and ``figures/`` are written anew each time.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastdraft_hf._atomic import atomic_folder, write_json
from fastdraft_hf._errors import FastDraftError
from fastdraft_hf._progress import Progress
from fastdraft_hf.draft.config import DesignConfig
from fastdraft_hf.tune.config import TuneConfig
from fastdraft_hf.tune.grid import Design, designs_of, draft_config
from fastdraft_hf.tune.predict import (
    Acceptance,
    RoundCost,
    fit_law,
    predict,
)
from fastdraft_hf.tune.timing import (
    LoopTimer,
    Timer,
    Timing,
    keeps_drafts,
    median_and_quartiles,
    round_costs,
)

if TYPE_CHECKING:
    from fastdraft_hf.target.resolve import Target

logger = logging.getLogger(__name__)

# Taken where neither an acceptance nor a probe is asked for; all designs alike.
DEFAULT_ACCEPTANCE = 0.4
# Words of settings that are no part of what a timing depends on.
_NOT_TIMED = {"acceptance", "probe_tokens", "rows", "probe_texts", "repeats", "depths"}
_NOT_TIMED |= {"widths_per_depth", "width_multiple", "params"}

MakeTimer = Callable[[], Timer]
# Designs -> acceptance of each, by name; the real one trains.
Prober = Callable[[list[Design]], Mapping[str, Acceptance]]


def search(
    config: TuneConfig,
    target: Target,
    folder: Path,
    *,
    make_timer: MakeTimer | None = None,
    prober: Prober | None = None,
) -> dict[str, Any]:
    """Return the best design and γ on this machine, and all that led there.

    Args:
        config: what is searched, and how.
        target: the model to draft for.
        folder: keeps everything; what a killed run finished is not done again.
        make_timer: another way to time; by default rounds of our loop.
        prober: another way to measure acceptance; by default short trainings.

    Returns:
        what ``results.json`` holds; see docs/search.md.

    Raises:
        FastDraftError: a setting that cannot be, said before any work.
    """
    from transformers import AutoConfig

    target_config = AutoConfig.from_pretrained(target.path)
    text = target_config.get_text_config()
    gammas = list(range(1, config.max_num_assistant_tokens + 1))
    reach = config.context + (config.rounds + 1) * sum(g + 1 for g in gammas) + 64
    if reach > text.max_position_embeddings:
        raise FastDraftError(
            f"context: timing from {config.context} tokens reads up to {reach}, and the target "
            f"reads {text.max_position_embeddings}"
        )
    if config.draft_vocab_size is not None and config.draft_vocab_size >= text.vocab_size:
        raise FastDraftError(
            f"draft_vocab_size: {config.draft_vocab_size:,} must be below the vocabulary of "
            f"{text.vocab_size:,}"
        )
    if make_timer is None:
        _check_machine(config)
    designs = designs_of(target_config, config)
    scenarios = None if config.probe_tokens else given_acceptances(config, designs)
    if config.probe_tokens and prober is None:
        prober = _trainer_prober(config, target, folder, gammas)

    timed_names = [d.name for d in designs]
    logger.info("tune: %d designs of %s parameters", len(designs), f"{config.params:,}")
    key = _timing_key(config, target, text.vocab_size)
    timings = _time(config, target, target_config, designs, folder, key, gammas, make_timer)
    costs = round_costs({n: timings[n] for n in timed_names}, pooled=config.measure != "cuda")
    if scenarios is None:
        assert prober is not None
        scenarios = [dict(prober(designs))]
    results = results_of(config, designs, timings, costs, scenarios, gammas)
    results["target"] = target.name
    write_json(folder / "results.json", results)
    return results


def _check_machine(config: TuneConfig) -> None:
    if config.measure == "openvino":
        from fastdraft_hf.export.openvino import require_openvino

        require_openvino()
    if config.measure == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise FastDraftError("measure: cuda, but PyTorch finds no GPU here")


def given_acceptances(config: TuneConfig, designs: list[Design]) -> list[dict[str, Acceptance]]:
    """Return the acceptance of every design, once for each number of a list.

    Raises:
        FastDraftError: a mapping names no design or depth there is, or leaves one out.
    """
    given = config.acceptance
    if not isinstance(given, dict):
        alphas = config.acceptances or [DEFAULT_ACCEPTANCE]
        return [{d.name: Acceptance(alpha) for d in designs} for alpha in alphas]
    known = {d.name for d in designs} | {str(d.layers) for d in designs}
    for name in given:
        if name not in known:
            raise FastDraftError(
                f"acceptance.{name}: no such design or depth; there are "
                + ", ".join(d.name for d in designs)
            )
    found = {}
    for design in designs:
        alpha = given.get(design.name, given.get(str(design.layers)))
        if alpha is None:
            raise FastDraftError(f"acceptance: none for design {design.name}")
        found[design.name] = Acceptance(alpha)
    return [found]


def _timing_key(config: TuneConfig, target: Target, vocabulary: int) -> str:
    """Return what timings depend on besides the design, as a short hash."""
    facts = {k: v for k, v in config.model_dump().items() if k not in _NOT_TIMED}
    facts |= {"target": target.name, "revision": target.revision, "vocabulary": vocabulary}
    facts |= {"path": str(target.path.resolve())}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]


def _time(
    config: TuneConfig,
    target: Target,
    target_config: Any,
    designs: list[Design],
    folder: Path,
    key: str,
    gammas: list[int],
    make_timer: MakeTimer | None,
) -> dict[str, list[Timing]]:
    """Time all designs, one after the other and then again, in changing directions."""
    path = folder / "timings.json"
    saved: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    def label(design: Design, repeat: int) -> str:
        return f"{key}/{design.name}/{design.feed_forward}/{repeat}"

    plan = [
        (design, repeat)
        for repeat in range(config.repeats)
        for design in (designs if repeat % 2 == 0 else designs[::-1])
    ]
    due = [(d, r) for d, r in plan if label(d, r) not in saved]
    if due:
        drafts = dict(zip(designs, _drafts(config, target_config, designs, folder), strict=True))
        timer = (make_timer or _real_timer(config, target, designs, gammas))()
        with Progress("tune timing", len(plan), "drafts", done=len(plan) - len(due)) as progress:
            for design, repeat in due:
                timing = timer.measure(drafts[design], repeat)
                saved[label(design, repeat)] = timing.to_dict()
                write_json(path, saved)
                progress.advance(1)
    else:
        logger.info("tune: timings of an earlier run are used; delete %s to time again", path)
    return {
        d.name: [Timing.from_dict(saved[label(d, r)]) for r in range(config.repeats)]
        for d in designs
    }


def _drafts(
    config: TuneConfig, target_config: Any, designs: list[Design], folder: Path
) -> list[Path]:
    """Write an untrained draft of every design, and export it where OpenVINO is timed."""
    from fastdraft_hf.draft.init import init
    from fastdraft_hf.draft.reduced_vocabulary import ReducedVocabulary, write_reduced_vocabulary

    trim = "" if config.draft_vocab_size is None else f"-v{config.draft_vocab_size}"
    paths = [folder / "designs" / f"{d.name}x{d.feed_forward}{trim}" for d in designs]
    random_weights = DesignConfig(init="scratch")
    with Progress("tune designs", len(designs), "drafts") as progress:
        for design, path in zip(designs, paths, strict=True):
            if not path.exists():
                shape = draft_config(target_config, design, config)
                model, _ = init(Path(), shape, random_weights, config.seed)
                with atomic_folder(path) as temporary:
                    model.save_pretrained(temporary)
                    if config.draft_vocab_size is not None:
                        # Which tokens do not matter for time.
                        head = ReducedVocabulary(tuple(range(config.draft_vocab_size)))
                        write_reduced_vocabulary(temporary, head)
            progress.advance(1)
    if config.measure != "openvino":
        return paths
    from fastdraft_hf.export.openvino import export_several

    exports = [folder / f"openvino-{config.weight_format}" / path.name for path in paths]
    with Progress("tune export", len(designs), "drafts") as progress:
        jobs = [(*pair, config.weight_format) for pair in zip(paths, exports, strict=True)]
        export_several(jobs, progress.advance)
    return exports


def _real_timer(
    config: TuneConfig, target: Target, designs: list[Design], gammas: list[int]
) -> MakeTimer:
    def make() -> Timer:
        path = target.path
        if config.measure == "openvino":
            from fastdraft_hf.export.openvino import cached_openvino

            logger.info("tune: the target in OpenVINO %s (exported once)", config.weight_format)
            path = cached_openvino(path, config.weight_format)
        return LoopTimer(
            path,
            config.measure,
            gammas,
            config.context,
            config.rounds,
            config.seed,
            config.threads,
            keeps_drafts(config.params, len(designs), config.measure),
        )

    return make


def _trainer_prober(config: TuneConfig, target: Target, folder: Path, gammas: list[int]) -> Prober:
    from fastdraft_hf.tune.probe import Probes

    return Probes(config, target, folder, gammas)


def results_of(
    config: TuneConfig,
    designs: list[Design],
    timings: Mapping[str, list[Timing]],
    costs: Mapping[str, RoundCost],
    scenarios: list[dict[str, Acceptance]],
    gammas: list[int],
) -> dict[str, Any]:
    """Return predictions for every design, γ and acceptance, the best of them, and the law."""
    law = fit_law([(d.layers, d.width, costs[d.name].next) for d in designs])
    rows = []
    for design in designs:
        cost = costs[design.name]
        firsts = [r.drafts[0] for t in timings[design.name] for r in t.rounds if r.drafts]
        nexts = [s for t in timings[design.name] for r in t.rounds for s in r.drafts[1:]]
        rows.append(
            {
                "design": design.name,
                **dataclasses.asdict(design),
                "first_pass_seconds": [*median_and_quartiles(firsts)],
                "next_pass_seconds": [*median_and_quartiles(nexts or firsts)],
                "catch_up_seconds": cost.catch_up,
                "verify_seconds": {str(g): cost.verify[g] for g in gammas},
                "outside_seconds": {str(g): cost.outside[g] for g in gammas},
                "predictions": [
                    {
                        "acceptance": scenario[design.name].alpha,
                        "tokens_per_second": {
                            str(g): predict(cost, scenario[design.name], g) for g in gammas
                        },
                        "block_efficiency": {
                            str(g): scenario[design.name].block_efficiency(g) for g in gammas
                        },
                    }
                    for scenario in scenarios
                ],
            }
        )
    bests = [_best(rows, number, gammas) for number in range(len(scenarios))]
    by_name = {d.name: d for d in designs}
    chosen = by_name[bests[0]["design"]]
    alike = all(len({a.alpha for a in s.values()}) == 1 for s in scenarios)
    return {
        "settings": config.model_dump(),
        "designs": rows,
        "best": {**bests[0], "section": chosen.section(config)},
        "best_by_acceptance": bests,
        "one_acceptance_for_all": alike,
        "probed": bool(config.probe_tokens),
        "law": {**dataclasses.asdict(law), "holds": law.holds, "sentence": law.sentence()},
    }


def _best(rows: list[dict[str, Any]], scenario: int, gammas: list[int]) -> dict[str, Any]:
    speed, row, gamma = max(
        (
            (row["predictions"][scenario]["tokens_per_second"][str(gamma)], row, gamma)
            for row in rows
            for gamma in gammas
        ),
        key=lambda found: found[0],
    )
    return {
        "design": row["design"],
        "num_assistant_tokens": gamma,
        "tokens_per_second": speed,
        "acceptance": row["predictions"][scenario]["acceptance"],
    }
