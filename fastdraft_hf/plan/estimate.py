"""Tokens, time, memory and disk of every stage of a recipe, and the expected speed-up."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fastdraft_hf._errors import FastDraftError
from fastdraft_hf._extras import openvino_available
from fastdraft_hf.data.config import GeneratedSet
from fastdraft_hf.data.target_logits import stored_bytes
from fastdraft_hf.draft.design import design_draft
from fastdraft_hf.eval import bench
from fastdraft_hf.eval.metrics import acceptance_of_rate, expected_block_efficiency, mbsu
from fastdraft_hf.plan.machines import Machine, Shape, shape_of
from fastdraft_hf.recipe import Recipe, distribution_source
from fastdraft_hf.stages.run import PROVENANCE, Run
from fastdraft_hf.stages.runner import grows, planned
from fastdraft_hf.target.resolve import resolve_target

# Stages that use every process; the others run on the main one.
PARALLEL = ("generate", "logits", "pretrain", "continue", "align", "evaluate")
# By kind of set: mean over longest length of a completion, and tokens of a prompt.
LENGTH_SHARE = {"free": 0.86, "magpie": 0.75, "code": 0.58, "passages": 0.58, "dataset": 0.75}
PROMPT_TOKENS = {"free": 1.0, "magpie": 85.0, "code": 70.0, "passages": 90.0, "dataset": 120.0}
# Magpie's instructions: tokens before them, mean over longest length, share the filters keep.
INSTRUCTION_PREFIX, INSTRUCTION_SHARE, KEPT_INSTRUCTIONS = 30.0, 0.52, 0.74
EVALUATION_PROMPT = 150
# Seconds a stage takes whatever its size, on two CPU cores; 3 where it is not listed.
FIXED = {"design": 1.5, "generate": 5.0, "logits": 4.0, "evaluate": 5.0, "card": 0.5, "report": 1.5}
EXPORT = 19.0  # seconds of one OpenVINO export and its check
LOAD_BANDWIDTH = 6e8  # bytes/s of weights
BASE_MEMORY = 0.6e9  # Python, PyTorch and transformers
FORM_BYTES = {"fp32": 4.0, "f32": 4.0, "q8_0": 1.07, "int8": 1.0, "int4": 0.7}
ASSUMPTIONS = (
    "a completion is 86% (free), 75% (magpie, dataset) or 58% (code, passages) of the longest "
    "allowed, 74% of Magpie's instructions are kept, and an evaluation prompt has 150 tokens, as "
    "in the quickstart",
    "a stage takes 0.5 to 5 s whatever its size, an OpenVINO export 19 s, loading 1 s per 0.6 GB",
)
Sets = dict[str, tuple[float, float, float]]  # rows, prompt and completion tokens by set
Answers = list[tuple[str, int, int, bool]]  # path, γ, number, whether the draft is trained


@dataclass
class StagePlan:
    """What one stage costs.

    Attributes:
        tokens: trained on, written, read or decoded.
        seconds: wall time; of a finished stage, what it took.
        memory_bytes: peak of one device (on a CPU: of the process).
        disk_bytes: at most, checkpoints and prepared text included.
        devices: how many it uses.
    """

    stage: str
    tokens: float = 0.0
    seconds: float = 0.0
    memory_bytes: float = BASE_MEMORY
    disk_bytes: float = 0.0
    devices: int = 1
    finished: bool = False
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Plan:
    """A recipe's costs on some hardware, and for every γ what its draft should bring."""

    machine: Machine
    target: Shape
    draft: Shape
    acceptance: float
    stages: list[StagePlan]
    gains: list[dict[str, Any]]
    assumptions: list[str]

    @property
    def seconds(self) -> float:
        return sum(stage.seconds for stage in self.stages)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "seconds": self.seconds}


def _config(path: Path | str, key: str) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:160]
        raise FastDraftError(f"{key}: cannot read {path}/config.json ({reason})") from error


def make_plan(recipe: Recipe, machine: Machine | None, acceptance: float | None = None) -> Plan:
    """Return the plan of a recipe.

    Args:
        recipe: as resolved for the machine's device. Of its target, config.json is enough.
        machine: ``None`` is this machine's CPU, which is measured for up to a minute.
        acceptance: rate at γ = 3, above 0 and below 1; by default from the token budget.
    """
    folder = resolve_target(recipe.target, recipe.target_revision, weights=False).path
    config, given = _config(folder, "target"), recipe.design.draft
    draft = _config(given, "design.draft") if given else design_draft(config, recipe.design)
    shapes, notes = (shape_of(config), shape_of(draft)), list[str]()
    if acceptance is None:
        acceptance = assumed_acceptance(recipe)
        notes.append(
            f"acceptance rate at γ = 3: {acceptance:g}, by the logarithm of the token budget "
            "between the quickstart's 0.134 at 0.64M and the paper's 0.466 at 12.5B"
        )
    if machine is None:
        from fastdraft_hf.plan.calibrate import calibrate

        machine = calibrate(recipe, folder, draft, *shapes)
    job = Job(recipe, *shapes, machine, acceptance_of_rate(acceptance, 3))
    notes += [*machine.assumptions(), *ASSUMPTIONS]
    if machine.count > 1:
        notes.append(f"time divides by {machine.count} in {', '.join(PARALLEL)}")
    return Plan(machine, *shapes, acceptance, job.stages(), job.gains(), notes)


def assumed_acceptance(recipe: Recipe) -> float:
    """Return the acceptance rate at γ = 3 that the recipe's token budget should give.

    Between the quickstart's, and the paper's mean of Dolly and HumanEval for Phi-3-mini 50M.
    """
    tokens = sum(stage.max_train_tokens for stage in recipe.training_stages().values())
    share = math.log(max(tokens, 0.64e6) / 0.64e6) / math.log(12.5e9 / 0.64e6)
    return round(0.134 + (0.466 - 0.134) * min(1.0, share), 3)


def passes(name: str, wanted: GeneratedSet) -> list[tuple[str, float, float, float]]:
    """Return the target's passes over a set: name, rows, prompt and completion tokens."""
    rows, found = float(wanted.rows), []
    if wanted.kind == "magpie":
        length = INSTRUCTION_SHARE * wanted.max_instruction_tokens
        found.append((f"{name}-instructions", rows, INSTRUCTION_PREFIX, length))
        rows *= KEPT_INSTRUCTIONS
    every = wanted.temperatures_per_prompt == "all"
    rows *= len(wanted.temperatures) if every else 1
    length = LENGTH_SHARE[wanted.kind] * wanted.max_new_tokens
    return [*found, (name, rows, PROMPT_TOKENS[wanted.kind], length)]


def row_tokens(recipe: Recipe, name: str, sets: Sets) -> float:
    """Return the mean length of a training stage's sequences."""
    config = recipe.training_stages()[name]
    read = [sets[source.name] for source in config.sources if source.name in sets]
    if name != "align" or not read:
        return float(config.max_length)
    tokens = sum(count * (prompt + length) for count, prompt, length in read)
    return min(float(config.max_length), tokens / sum(count for count, _, _ in read))


def evaluate_answers(recipe: Recipe) -> Answers:
    """Return what stage evaluate decodes with the trained draft and without."""
    config = recipe.evaluate
    count = len(config.tasks) * config.prompts_per_task
    gammas = config.gammas * len(config.sampled) + config.greedy_gammas
    return [("alone", 0, count, False), *((config.path, g, count, True) for g in gammas)]


def bench_answers(recipe: Recipe) -> Answers:
    """Return what stage bench decodes: all repeats, and one for warm-up and memory."""
    config = recipe.bench
    known = bench.BASELINES if openvino_available() else bench.RUNTIMES["pytorch"]
    paths = [path for path in dict.fromkeys(config.paths) if path in known]
    reduced = paths if recipe.reduced_vocabulary is not None else ()
    gammas, drafts = config.num_assistant_tokens, list(config.drafts)
    settings = bench.all_settings(bench.assisted_settings(paths, gammas, drafts, reduced))
    count = len(config.tasks) * config.prompts_per_task * config.repeats + 1
    found = [(one.path, one.num_assistant_tokens) for one in settings]
    return [(path, gamma, count, gamma > 0) for path, gamma in found]


@dataclass
class Job:
    """A recipe on a machine; ``alpha`` is the chance that a drafted token is accepted."""

    recipe: Recipe
    target: Shape
    draft: Shape
    machine: Machine
    alpha: float

    def stages(self) -> list[StagePlan]:
        """Return a line for every stage the recipe has, in order."""
        run, found, sets = Run(self.recipe, Path(self.recipe.output_dir)), [], Sets()
        for name in planned(self.recipe):
            line = StagePlan(name, seconds=FIXED.get(name, 3.0))
            line.devices = self.machine.count if name in PARALLEL else 1
            line.disk_bytes = 4.0 * self.draft.parameters
            if name in self.recipe.training_stages():
                self._train(line, sets)
            elif name in ("generate", "logits"):
                getattr(self, f"_{name}")(line, sets)
            else:
                self._measure(line)
            if run.finished(name) and not grows(run, name):
                took = json.loads((run.stage_folder(name) / PROVENANCE).read_text(encoding="utf-8"))
                line.finished, line.seconds = True, float(took["wall_seconds"])
            found.append(line)
        return found

    def _loads(self, line: StagePlan, *shapes: Shape, element: float = 0) -> None:
        size = sum(shape.parameters for shape in shapes)
        line.seconds += 4.0 * size / LOAD_BANDWIDTH
        line.memory_bytes += (element or self.machine.element) * size

    def _engine(self, wanted: str) -> str:
        if wanted == "auto" and self.machine.cpu:
            return "openvino" if openvino_available() else "transformers"
        return wanted if self.machine.cpu or self.machine.cuda else "vllm"

    def _write(self, rows: float, prompt: float, tokens: float, batch: int, engine: str) -> float:
        """Return how long all devices take to write ``rows`` texts, ``batch`` at once on each."""
        each = rows / self.machine.count
        texts = min(batch, max(each, 1.0))
        step = self.machine.step(self.target, texts, prompt + tokens / 2, engine)
        reading = prompt / self.machine.read_rate(self.target, prompt / 2, engine)
        return each * (reading + tokens * step / texts)

    def _generate(self, line: StagePlan, sets: Sets) -> None:
        config = self.recipe.generate
        assert config is not None
        engine, batch = "vllm" if config.servers else self._engine(config.engine), config.batch_size
        for name, wanted in config.sets.items():
            kept = 1.0  # share of the instructions that a time limit left
            for label, rows, prompt, length in passes(name, wanted):
                rows *= kept
                # transformers waits for the longest completion of a batch.
                waits = engine in ("auto", "transformers")
                steps = length / (LENGTH_SHARE[wanted.kind] if waits else 1)
                took = self._write(rows, prompt, steps, batch, engine)
                limit = 60 * (wanted.max_minutes or math.inf)
                if took > limit:
                    kept, rows = kept * limit / took, rows * limit / took
                    # Completions that have started are finished.
                    took = limit * (1 + min(1.0, batch * self.machine.count / rows))
                    line.notes.append(f"{label}: cut to {rows:,.0f} rows by max_minutes")
                line.seconds += took
                line.tokens += rows * length
                sets[name] = (rows, prompt, length)
        self._loads(line, self.target, element=1.0 if engine == "openvino" else 0)
        longest = max((w.max_new_tokens + 200 for w in config.sets.values()), default=0)
        cache = batch * longest * self.target.cache_bytes(self.machine.element)
        line.memory_bytes += 1.7e9 if engine == "openvino" else cache  # GenAI's cache and buffers
        line.disk_bytes = 4.0 * line.tokens

    def _logits(self, line: StagePlan, sets: Sets) -> None:
        config = self.recipe.logits
        assert config is not None
        read = [sets[name] for name in config.sets if name in sets]
        line.tokens = sum(count * (prompt + length) for count, prompt, length in read)
        # Slower than reading prompts: the head and its top k, and fp16 instead of int8.
        rate = 0.7 * self.machine.read_rate(self.target, 128, self._engine(config.engine))
        line.seconds += line.tokens / rate / line.devices
        self._loads(line, self.target)
        line.memory_bytes += config.batch_tokens * self.target.width * 20.0
        written = round(sum(count * length for count, _, length in read))
        line.disk_bytes = stored_bytes(written, config.top_k, self.target.vocabulary)

    def _train(self, line: StagePlan, sets: Sets) -> None:
        name, config = line.stage, self.recipe.training_stages()[line.stage]
        length = row_tokens(self.recipe, name, sets)
        rate = line.devices * self.machine.train_rate(name, self.draft, length)
        if distribution_source(self.recipe, name) == "online":
            own = 3 * self.draft.flops(length / 2)
            rate *= own / (own + self.target.flops(length / 2))
            self._loads(line, self.target)
            line.notes.append("with the target's distribution, online")
        line.tokens = float(config.max_train_tokens)
        limit = 60 * (config.max_minutes or math.inf) * rate
        if line.tokens > limit:
            line.tokens = limit
            line.notes.append(f"cut to {limit:,.0f} tokens by max_minutes")
        batch = config.per_device_train_batch_size * length
        step = batch * config.gradient_accumulation_steps * line.devices
        evaluations = math.ceil(line.tokens / step / config.save_steps)
        evaluated = evaluations * config.eval_rows * length
        line.seconds += (line.tokens + evaluated / 3) / rate  # forward passes only
        # Weights, gradients and two moments in float32, activations, a chunk of the head's logits.
        each = self.draft.layers * (14 * self.draft.width + 4 * self.draft.inner)
        line.memory_bytes += 16.0 * self.draft.parameters + 1536 * self.draft.vocabulary
        line.memory_bytes += batch * each * self.machine.element
        # Two checkpoints, and ids of 4 bytes unless they are streamed.
        line.disk_bytes += 24.0 * self.draft.parameters
        line.disk_bytes += 0.0 if name != "align" and config.streams else 4.0 * line.tokens

    def _measure(self, line: StagePlan) -> None:
        """Plan design, reduced_vocabulary, export, evaluate and bench."""
        recipe, name = self.recipe, line.stage
        read, answers, longest = 0.0, Answers(), 0
        if name == "design" and recipe.design.init != "scratch" and recipe.design.draft is None:
            self._loads(line, self.target, element=4.0)
        elif name == "reduced_vocabulary" and recipe.reduced_vocabulary is not None:
            read = recipe.reduced_vocabulary.texts * (EVALUATION_PROMPT + 128.0)
        elif name == "export":
            forms = [*recipe.export.openvino, *recipe.export.gguf]
            copies = 1 if recipe.reduced_vocabulary is None else 2
            line.seconds = copies * EXPORT * len(recipe.export.openvino) + 3.0 * len(forms)
            line.disk_bytes = self.draft.parameters * sum(FORM_BYTES.get(f, 2.0) for f in forms)
            # Written by the target in batches of eight, read by it and each form.
            read = recipe.export.acceptance_texts * 48.0 * (1 + len(forms)) * bool(forms)
            answers, longest = [("alone", 0, 2 * bool(read), False)], 48
        elif name == "evaluate":
            config = recipe.evaluate
            answers, longest = evaluate_answers(recipe), config.max_new_tokens
            # Sampled answers are read again, for the expected acceptance.
            rows = len(config.tasks) * config.prompts_per_task * len(config.gammas)
            read = rows * len(config.sampled) * (EVALUATION_PROMPT + longest)
        elif name == "bench":
            answers, longest = bench_answers(recipe), recipe.bench.max_new_tokens
        seconds = read / self.machine.read_rate(self.target, 128)
        for path, gamma, count, trained in answers:
            tau = expected_block_efficiency(self.alpha, gamma) if trained else 1.0
            prompt = EVALUATION_PROMPT / self.machine.read_rate(self.target, 75, path)
            seconds += count * (prompt + longest / tau * self._round(path, gamma))
            line.tokens += count * longest
        line.seconds += seconds / line.devices
        if seconds:
            self._loads(line, self.target, self.draft)

    def _round(self, path: str, gamma: int) -> float:
        return self.machine.round_seconds(self.target, self.draft, path, gamma)

    def gains(self) -> list[dict[str, Any]]:
        """Return what each γ of the recipe should bring at the assumed acceptance."""
        config, cost = self.recipe.bench, self.draft.parameters / self.target.parameters
        known = bench.BASELINES if self.machine.cpu else bench.RUNTIMES["pytorch"]
        paths = [p for p in config.paths or ["ours"] if p in known and "lookup" not in p]
        found = []
        for gamma in sorted({*config.num_assistant_tokens, *self.recipe.evaluate.gammas}):
            tau = expected_block_efficiency(self.alpha, gamma)
            gain = {"num_assistant_tokens": gamma, "block_efficiency": tau}
            speed = {
                p: tau * self._round(bench.BASELINES[p], 0) / self._round(p, gamma) for p in paths
            }
            found.append({**gain, "mbsu": mbsu(tau, cost, gamma), "speed": speed})
        return found
