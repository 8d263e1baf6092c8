"""Stage generate: the target generates the completions that the draft learns from."""

import importlib.util
import logging
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from fastdraft_hf._atomic import read_json
from fastdraft_hf._errors import FastDraftError
from fastdraft_hf._processes import on_main, world
from fastdraft_hf.data.engines import (
    Engine,
    EngineName,
    OpenVINOEngine,
    TransformersEngine,
    VLLMEngine,
)
from fastdraft_hf.data.filters import FILTERS
from fastdraft_hf.data.parts import stored_indices
from fastdraft_hf.data.task_sets import Decontaminator
from fastdraft_hf.data.traffic import LoggedAnswers
from fastdraft_hf.export.openvino import cached_openvino, use_openvino
from fastdraft_hf.hub.folder import read_record
from fastdraft_hf.recipe import resolve_device
from fastdraft_hf.stages import deadline
from fastdraft_hf.stages.generated_sets import KINDS, TrafficSet
from fastdraft_hf.stages.run import Run
from fastdraft_hf.target.resolve import load_config, load_tokenizer, stop_ids

logger = logging.getLogger(__name__)


def run(run: Run, folder: Path) -> dict[str, Any]:
    """Generate every set of the recipe, one folder each. All processes share the rows."""
    config = run.recipe.generate
    assert config is not None  # the stage is planned only with its section
    if not config.sets:
        raise FastDraftError("generate.sets: at least one set is needed")
    # Before any work: a task set that cannot be read stops the run.
    decontaminator = Decontaminator.of_task_sets(run.recipe.evaluate.tasks, run.recipe.bench.tasks)
    tokenizer = run.chat_tokenizer()
    sets = [
        KINDS[wanted.kind](run, folder / name, wanted, tokenizer, decontaminator)
        for name, wanted in config.sets.items()
    ]
    # A dataset that cannot be read stops the run before the model is loaded.
    for one in sets:
        one.prepare()
    logged = all(isinstance(one, TrafficSet) for one in sets)
    if not logged and run.recipe.max_hours is not None:
        _time_training(run)
    engine = None if logged else _open_engine(run, tokenizer)
    return {
        "engine": LoggedAnswers.name if engine is None else engine.name,
        "sets": {one.folder.name: one.generate(engine) for one in sets},
        "held_out": decontaminator.held_out,
        "cut": [line for one in sets for line in one.cut],
    }


def _time_training(run: Run) -> None:
    """Train the new draft for some steps, so that the time left is shared with stage align well."""
    from fastdraft_hf.train.loop import tokens_per_minute

    section, draft = run.recipe.training_stages().get("align"), run.stage_folder("design")
    if section is None or world() > 1 or "trained" in deadline.rates_of(run):
        return
    tokenizer, device = load_tokenizer(draft), resolve_device(run.recipe.device)
    deadline.note_rates(run, trained=tokens_per_minute(draft, section, tokenizer, device))


def unchanged(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Return what of a folder stays valid: sets that did not change or only get more rows.

    The first rows of a larger set are those of the smaller one. That does not hold for a set with
    ``max_minutes``: its rows depend on what was in flight when the time was up.
    """
    if {**old, "sets": None} != {**new, "sets": None}:
        return []

    def more_of(had: dict[str, Any], wanted: dict[str, Any] | None) -> bool:
        if wanted is None or {**had, "rows": None} != {**wanted, "rows": None}:
            return False
        grew: bool = wanted["rows"] > had["rows"] and wanted["max_minutes"] is None
        return grew or wanted["rows"] == had["rows"]

    return [name for name, had in old["sets"].items() if more_of(had, new["sets"].get(name))]


def lacks_rows(folder: Path) -> bool:
    """Return whether a finished stage has fewer rows than were judged, or no judgment."""
    sets = [folder / name for name in read_record(folder).get("facts", {}).get("sets", {})]
    inside = [one / "instructions" for one in sets]
    sets += [one for one in inside if (one / FILTERS).exists()]
    return any(
        not (one / FILTERS).exists() or read_json(one / FILTERS)["rows"] > len(stored_indices(one))
        for one in sets
    )


def _open_engine(run: Run, tokenizer: PreTrainedTokenizerBase) -> Engine:
    """Load the run's target into the engine of ``generate.engine``."""
    config, path = run.recipe.generate, run.target.path
    assert config is not None  # the stage is planned only with its section
    ends = stop_ids(path, tokenizer)
    if config.server is None:
        device = resolve_device(run.recipe.device)
        return load_engine(config.engine, path, ends, config.batch_size, device)
    from fastdraft_hf.data.engines.server import ServerEngine

    return ServerEngine(
        config.server,
        ends,
        config.batch_size,
        # The head may score more ids than the tokenizer has.
        vocab_size=load_config(path).get_text_config().vocab_size,
        model=config.server_model,
        target=run.target.name,
    )


def load_engine(
    name: EngineName, target: Path, stop_ids: set[int], batch_size: int, device: str = "cpu"
) -> Engine:
    """Load the target's folder into an engine of this process.

    ``auto`` is vLLM or transformers on a GPU, and on a CPU OpenVINO where it can read the target.

    Raises:
        FastDraftError: the engine is not installed, or cannot read the target.
    """
    if use_openvino(name, device, "generate.engine", target):
        logger.info("exporting the target to OpenVINO int8 (once)")
        return OpenVINOEngine(
            on_main(lambda: cached_openvino(target, "int8")), stop_ids, batch_size
        )
    installed = importlib.util.find_spec("vllm") is not None
    if name == "vllm" and not installed:
        raise FastDraftError("generate.engine: vllm is not installed; see docs/engines.md")
    # Of several processes each has a GPU of its own, which vLLM would not keep to.
    if name == "vllm" or (name == "auto" and device == "cuda" and installed and world() == 1):
        return VLLMEngine(target, stop_ids, batch_size)
    return TransformersEngine(target, stop_ids, batch_size, device)
