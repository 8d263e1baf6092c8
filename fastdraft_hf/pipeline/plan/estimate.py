"""From a recipe and a machine to a plan: one line a stage, and what the draft should bring."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fastdraft_hf.data.target_logits import stored_bytes
from fastdraft_hf.evaluation import evaluate
from fastdraft_hf.evaluation.bench import BASELINES, RUNTIMES, Setting
from fastdraft_hf.evaluation.metrics import mbsu
from fastdraft_hf.pipeline.plan.amounts import (
    EVALUATION_PROMPT,
    Answers,
    bench_answers,
    evaluation_answers,
    stored_sets,
    writings,
)
from fastdraft_hf.pipeline.plan.hardware import Hardware
from fastdraft_hf.pipeline.plan.machines import Machine
from fastdraft_hf.pipeline.plan.shapes import Shape
from fastdraft_hf.pipeline.recipe import Recipe, distribution_source
from fastdraft_hf.pipeline.run import PROVENANCE, STAGES, planned

# Seconds that a stage takes whatever its size: loading, reading text, writing files. Measured on
# two CPU cores with the embedded target (docs/plan.md).
FIXED = {
    "design": 1.5,
    "generate": 5.0,
    "logits": 4.0,
    "pretrain": 3.0,
    "continue": 3.0,
    "align": 3.0,
    "trim": 3.0,
    "export": 0.0,
    "evaluate": 5.0,
    "bench": 3.0,
    "card": 0.5,
    "report": 1.5,
}
# Of one OpenVINO export by optimum-intel in a process of its own; of comparing it with PyTorch; of
# one process of bench that measures memory, without its answer.
EXPORT_SECONDS, CHECK_SECONDS, MEMORY_PROCESS_SECONDS = 14.0, 5.0, 4.5
# Bytes/s at which weights are read from disk and converted, and parameters/s that are exported.
LOAD_BANDWIDTH, EXPORT_RATE = 6e8, 3e7
# Resident bytes of Python with PyTorch and transformers.
BASE_MEMORY = 0.6e9
# Timed steps of a stage with a limit in minutes.
TIMED_STEPS = 12
# Tokens of a held-out text that trim reads (`tuning.texts`).
TRIM_TEXT = 128
# Share of a training token's FLOPs that one of evaluation costs.
FORWARD_SHARE = 1 / 3

# Acceptance rates (γ = 3) that are known: the quickstart's after 0.64M tokens, and the paper's mean
# of Dolly and HumanEval for Phi-3-mini 50M after 12.5B.
KNOWN_ACCEPTANCE = ((0.64e6, 0.134), (12.5e9, 0.466))


@dataclass(frozen=True)
class StagePlan:
    """What one stage costs.

    Attributes:
        stage: its name.
        finished: the run's folder has it; ``seconds`` is then what it took.
        devices: how many it uses.
        tokens: that are trained on, written, read or decoded.
        flops: of all of it.
        seconds: wall time.
        memory_bytes: at most, on one device (on a CPU: resident).
        disk_bytes: that stay.
        scratch_bytes: that are needed besides while it runs.
        notes: what cuts or bounds it.
    """

    stage: str
    finished: bool
    devices: int
    tokens: float
    flops: float
    seconds: float
    memory_bytes: float
    disk_bytes: float
    scratch_bytes: float = 0.0
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Gain:
    """What the draft should bring with γ tokens drafted a round.

    Attributes:
        block_efficiency: τ, tokens a pass of the target.
        mbsu: τ / (cγ + 1).
        speed: predicted ratio to the target alone, by path; one text at a time.
    """

    num_assistant_tokens: int
    block_efficiency: float
    mbsu: float
    speed: dict[str, float]


@dataclass(frozen=True)
class Plan:
    """A recipe's costs on some hardware."""

    recipe: str
    target: str
    hardware: str
    draft_parameters: int
    target_parameters: int
    stages: tuple[StagePlan, ...]
    acceptance: float
    acceptance_note: str
    gains: tuple[Gain, ...]
    assumptions: tuple[str, ...] = field(default=())

    @property
    def seconds(self) -> float:
        return sum(stage.seconds for stage in self.stages)

    def to_json(self) -> dict[str, Any]:
        """Return everything as plain values; sums included."""
        data = asdict(self)
        data["total"] = {
            "seconds": self.seconds,
            "flops": sum(s.flops for s in self.stages),
            "disk_bytes": sum(s.disk_bytes for s in self.stages),
            "peak_memory_bytes": max(s.memory_bytes for s in self.stages),
        }
        return data


def assumed_acceptance(recipe: Recipe) -> tuple[float, str]:
    """Return an acceptance rate at γ = 3 for the recipe's token budget, and where it is from."""
    tokens = sum(stage.max_train_tokens for stage in recipe.training_stages().values())
    if not tokens:
        return KNOWN_ACCEPTANCE[0][1], "the quickstart's"
    (few, low), (many, high) = KNOWN_ACCEPTANCE
    share = (math.log(tokens) - math.log(few)) / (math.log(many) - math.log(few))
    value = low + (high - low) * min(1.0, max(0.0, share))
    return round(value, 3), (
        f"between the quickstart's {low} at 0.64M tokens and the paper's {high} at 12.5B (mean of "
        "Dolly and HumanEval), by the logarithm of the budget"
    )


def chance_of(acceptance_rate: float, num_assistant_tokens: int) -> float:
    """Return the chance α a place that gives this share of accepted tokens at γ.

    A place is reached only if those before it were accepted, so the share is
    (α + α² + … + α^γ) / γ.
    """
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        share = sum(middle**k for k in range(1, num_assistant_tokens + 1)) / num_assistant_tokens
        low, high = (middle, high) if share < acceptance_rate else (low, middle)
    return (low + high) / 2


def block_efficiency(chance: float, num_assistant_tokens: int) -> float:
    """Return τ = 1 + α + … + α^γ."""
    return sum(chance**k for k in range(num_assistant_tokens + 1))


class Estimator:
    """Goes through a recipe's stages in order; training uses what generation leaves.

    Args:
        recipe: the recipe, as it is resolved for the hardware.
        target, draft: their shapes.
        hardware: what it runs on.
        machine: how fast that is.
        acceptance: assumed share of accepted tokens at γ = 3.
        export_ready: the target's OpenVINO folder exists.
        folder: the run's, to find finished stages in.
    """

    def __init__(
        self,
        recipe: Recipe,
        target: Shape,
        draft: Shape,
        hardware: Hardware,
        machine: Machine,
        *,
        acceptance: float,
        export_ready: bool = True,
        folder: Path | None = None,
    ) -> None:
        self.recipe, self.target, self.draft = recipe, target, draft
        self.hardware, self.machine = hardware, machine
        self.chance = chance_of(acceptance, 3)
        self.export_ready, self.folder = export_ready, folder
        self.cpu = hardware.device is None
        # Rows, prompt and completion tokens by set, as generation leaves them.
        self.sets: dict[str, tuple[float, float, float]] = {}

    def stages(self) -> list[StagePlan]:
        """Return a line for every stage the recipe has."""
        return [self._known(self._stage(name)) for name in planned(self.recipe)]

    def _known(self, stage: StagePlan) -> StagePlan:
        """Put in what a finished stage took."""
        from dataclasses import replace

        if self.folder is None:
            return stage
        path = self.folder / STAGES[stage.stage].folder / PROVENANCE
        if not path.exists():
            return stage
        seconds = float(json.loads(path.read_text(encoding="utf-8"))["wall_seconds"])
        return replace(stage, finished=True, seconds=seconds)

    def _stage(self, name: str) -> StagePlan:
        special = {
            "design": self._design,
            "generate": self._generate,
            "logits": self._logits,
            "trim": self._trim,
            "export": self._export,
            "evaluate": self._evaluate,
            "bench": self._bench,
        }
        if name in special:
            return special[name]()
        if name in self.recipe.training_stages():
            return self._train(name)
        disk = 4.0 * self.draft.parameters if name == "card" else 2e6
        return StagePlan(name, False, 1, 0, 0, FIXED[name], BASE_MEMORY, disk)

    def _weights(self, shape: Shape) -> float:
        """Return the bytes of a model as it is run: float32 on a CPU, bfloat16 elsewhere."""
        return shape.parameters * (4.0 if self.cpu else 2.0)

    def _memory(self, size: float) -> float:
        return size + (BASE_MEMORY if self.cpu else 0.5e9)

    def _loading(self, *shapes: Shape) -> float:
        return sum(shape.parameters * 4.0 for shape in shapes) / LOAD_BANDWIDTH

    def _design(self) -> StagePlan:
        slow = self.recipe.design.first_weights != "scratch" and self.recipe.design.draft is None
        reads = self._loading(self.target) if slow else 0.0
        # First weights are made on the CPU in float32, whatever the device.
        memory = BASE_MEMORY + 4.0 * self.draft.parameters
        memory += 4.0 * self.target.parameters if slow else 0
        notes = ("on the CPU: the memory is the machine's",) if slow and not self.cpu else ()
        seconds = FIXED["design"] + reads
        disk = 4.0 * self.draft.parameters
        return StagePlan("design", False, 1, 0, 0, seconds, memory, disk, notes=notes)

    def _generate(self) -> StagePlan:
        config = self.recipe.generate
        assert config is not None
        tokens = seconds = flops = 0.0
        notes = []
        for name, wanted in config.sets.items():
            kept = 1.0  # share of instructions that a limit in time left
            for part in writings(name, wanted):
                rows = part.rows * kept
                whole = self.machine.write_seconds(self.target, rows, part.prompt, part.tokens)
                if part.max_seconds is not None and whole > part.max_seconds:
                    share = part.max_seconds / whole
                    kept *= share
                    rows *= share
                    tail = self.machine.row_seconds(self.target, part.tokens)
                    whole = part.max_seconds + tail
                    notes.append(f"{part.name}: cut to {rows:,.0f} rows by max_minutes")
                seconds += whole
                tokens += rows * part.tokens
                context = part.prompt + part.tokens / 2
                flops += rows * (part.prompt + part.tokens) * self.target.forward_flops(context)
                if not part.name.endswith("-instructions"):
                    self.sets[name] = (rows, part.prompt, part.tokens)
        if not self.export_ready:
            export = EXPORT_SECONDS + self.target.parameters / EXPORT_RATE
            seconds += export
            notes.append(f"with {export:,.0f} s to export the target to OpenVINO, once a machine")
        longest = max((w.max_new_tokens + 200 for w in config.sets.values()), default=0)
        if self.cpu:
            memory = self._memory(self.target.parameters + 1.7e9)  # int8, GenAI's cache and buffers
        else:
            cache = config.batch_size * longest * self.target.cache_bytes()
            memory = self._memory(self._weights(self.target) + cache)
            seconds += self._loading(self.target)
        seconds += FIXED["generate"]
        return StagePlan(
            "generate",
            False,
            self.hardware.count,
            tokens,
            flops,
            seconds,
            memory,
            4.0 * tokens,
            notes=tuple(notes),
        )

    def _logits(self) -> StagePlan:
        config = self.recipe.logits
        assert config is not None
        rows = [self.sets[name] for name in stored_sets(self.recipe) if name in self.sets]
        read = sum(count * (prompt + tokens) for count, prompt, tokens in rows)
        stored = sum(count * tokens for count, _, tokens in rows)
        seconds = read / self.machine.read_rate(self.target, 128)
        seconds += FIXED["logits"] + self._loading(self.target)
        batch = config.batch_tokens * self.target.width * 20.0
        memory = self._memory(self._weights(self.target) + batch + 512 * self.target.vocabulary * 8)
        return StagePlan(
            "logits",
            False,
            1,
            read,
            read * self.target.forward_flops(128),
            seconds,
            memory,
            stored_bytes(round(stored), config.top_k, self.target.vocabulary),
        )

    def row_tokens(self, name: str) -> float:
        """Return the mean length of a training sequence."""
        config = self.recipe.training_stages()[name]
        if name != "align":
            return float(config.seq_length)
        read = [self.sets[s.name] for s in config.sources if s.name in self.sets]
        rows = sum(count for count, _, _ in read)
        if not rows:
            return float(config.seq_length)
        tokens = sum(count * (prompt + tokens) for count, prompt, tokens in read)
        return min(float(config.seq_length), tokens / rows)

    def _train(self, name: str) -> StagePlan:
        config = self.recipe.training_stages()[name]
        length = self.row_tokens(name)
        flops = self.draft.train_flops(length)
        online = distribution_source(self.recipe, name) == "online"
        if online:
            flops += self.target.forward_flops(length / 2)
        rate = self.machine.train_rate(name, self.draft, flops)
        notes = []
        if online:
            notes.append("with the target's distribution, online")
        tokens = float(config.max_train_tokens)
        step = (
            config.per_device_train_batch_size * config.gradient_accumulation_steps * length
        ) * self.hardware.count
        seconds = FIXED[name] + self._loading(self.draft)
        if config.max_minutes is not None:
            seconds += TIMED_STEPS * step / rate
            if tokens > 60 * config.max_minutes * rate:
                tokens = 60 * config.max_minutes * rate
                notes.append(f"cut to {tokens:,.0f} tokens by max_minutes")
        if name == "align":
            rows = sum(self.sets[s.name][0] for s in config.sources if s.name in self.sets)
            if rows:
                notes.append(f"{tokens / (rows * length):.1f} passes over the texts")
        steps = tokens / step
        evaluations = math.ceil(steps / config.save_steps) if config.eval_sequences else 0
        read = evaluations * config.eval_sequences * length
        seconds += tokens / rate + read * FORWARD_SHARE / rate
        trained = 16.0 * self.draft.parameters  # weights, gradients, two moments, float32
        batch = config.per_device_train_batch_size * length
        memory = trained + self.draft.activation_bytes(batch, 4 if self.cpu else 2)
        if online:
            memory += self._weights(self.target)
        return StagePlan(
            name,
            False,
            self.hardware.count,
            tokens,
            tokens * flops,
            seconds,
            self._memory(memory),
            4.0 * self.draft.parameters,
            scratch_bytes=2 * 12.0 * self.draft.parameters + 16.0 * tokens,
            notes=tuple(notes),
        )

    def _trim(self) -> StagePlan:
        config = self.recipe.trim
        assert config is not None
        # The target reads every held-out text once; the draft twice, which is little beside it.
        read = config.texts * float(EVALUATION_PROMPT + TRIM_TEXT)
        seconds = FIXED["trim"]
        memory = 8.0 * self.draft.parameters
        if read:
            seconds += read / self.machine.read_rate(self.target, 128) + self._loading(self.target)
            memory += 4.0 * self.target.parameters
        flops = read * self.target.forward_flops(128)
        disk = 4.0 * self.draft.parameters
        return StagePlan("trim", False, 1, read, flops, seconds, self._memory(memory), disk)

    def _export(self) -> StagePlan:
        config = self.recipe.export
        size = {"fp32": 4.0, "fp16": 2.0, "int8": 1.0, "int4": 0.7}
        size |= {"f32": 4.0, "f16": 2.0, "bf16": 2.0, "q8_0": 1.07}
        each = EXPORT_SECONDS + self.draft.parameters / EXPORT_RATE
        openvino = list(config.openvino)
        if self.recipe.trim is not None:
            openvino += [form for form in config.openvino if form != "int4"]
        seconds = len(openvino) * each + len(config.gguf) * 3.0
        forms = [*openvino, *config.gguf]
        if config.check:
            seconds += len(forms) * CHECK_SECONDS
        tokens = 0.0
        if forms and config.acceptance_texts:
            # One batch of short texts, then each form reads them; on the CPU, as exports are.
            tokens = config.acceptance_texts * 48.0
            step = self.machine.round_seconds(self.target, self.draft, Setting("alone"))
            # A batch of eight costs about two steps of one text.
            seconds += 48 * step * 2 + self._loading(self.target)
            seconds += (1 + len(forms)) * tokens / self.machine.read_rate(self.target, 24)
        disk = self.draft.parameters * sum(size[form] for form in forms)
        memory = self._memory(8.0 * self.draft.parameters)
        if tokens:
            memory += self._weights(self.target)
        flops = tokens * self.target.forward_flops(24) * (2 + len(forms))
        return StagePlan("export", False, 1, tokens, flops, seconds, memory, disk)

    def _answer_seconds(self, answers: Answers, new_tokens: int) -> float:
        gamma = answers.setting.num_assistant_tokens
        efficiency = block_efficiency(self.chance, gamma) if answers.assisted else 1.0
        rounds = new_tokens / efficiency
        return self.machine.prompt_seconds(
            self.target, EVALUATION_PROMPT, answers.setting
        ) + rounds * self.machine.round_seconds(self.target, self.draft, answers.setting)

    def _evaluate(self) -> StagePlan:
        config = self.recipe.evaluate
        answers = evaluation_answers(self.recipe)
        count = sum(a.count for a in answers)
        tokens = float(count * config.max_new_tokens)
        seconds = sum(a.count * self._answer_seconds(a, config.max_new_tokens) for a in answers)
        kinds = evaluate.settings_of(config)
        share = sum(kind.run == evaluate.SAMPLED for kind in kinds) / len(kinds)
        sampled = share * sum(a.count for a in answers if a.assisted)
        length = EVALUATION_PROMPT + config.max_new_tokens
        read = sampled * length
        seconds += read / self.machine.read_rate(self.target, length / 2)
        seconds += FIXED["evaluate"] + self._loading(self.target, self.draft, self.draft)
        memory = self._memory(4.0 * (self.target.parameters + 2 * self.draft.parameters))
        flops = (tokens + count * EVALUATION_PROMPT + read) * self.target.forward_flops(length / 2)
        return StagePlan("evaluate", False, 1, tokens, flops, seconds, memory, 100.0 * tokens)

    def _bench(self) -> StagePlan:
        config = self.recipe.bench
        answers = bench_answers(self.recipe)
        tokens = float(sum(a.count for a in answers) * config.max_new_tokens)
        seconds = sum(a.count * self._answer_seconds(a, config.max_new_tokens) for a in answers)
        warm_up = min(16, config.max_new_tokens)
        seconds += sum(self._answer_seconds(a, warm_up) for a in answers)
        if config.memory and answers:
            for name in {a.setting.name: a for a in answers}.values():
                seconds += MEMORY_PROCESS_SECONDS + self._loading(self.target, self.draft)
                seconds += self._answer_seconds(name, config.max_new_tokens)
        if answers:
            seconds += FIXED["bench"] + 2 * self._loading(self.target, self.draft)
        memory = self._memory(self._weights(self.target) + self._weights(self.draft))
        length = EVALUATION_PROMPT + config.max_new_tokens
        flops = tokens * self.target.forward_flops(length)
        return StagePlan("bench", False, 1, tokens, flops, seconds, memory, 100.0 * tokens)

    def gains(self) -> list[Gain]:
        """Return what each γ of the recipe should bring, by the assumed acceptance."""
        gammas = sorted({*self.recipe.bench.num_assistant_tokens, *self.recipe.evaluate.gammas})
        cost = self.draft.parameters / self.target.parameters
        paths = self.recipe.bench.paths or ["ours"]
        found = []
        for gamma in gammas:
            efficiency = block_efficiency(self.chance, gamma)
            speed: dict[str, float] = {}
            for path in paths:
                if path.endswith("prompt-lookup"):  # no draft
                    continue
                if not self.cpu and path in RUNTIMES["openvino"]:
                    continue
                alone = self.machine.round_seconds(
                    self.target, self.draft, Setting(BASELINES[path])
                )
                one = self.machine.round_seconds(self.target, self.draft, Setting(path, "", gamma))
                speed[path] = efficiency * alone / one
            found.append(Gain(gamma, efficiency, mbsu(efficiency, cost, gamma), speed))
        return found


def mean_rows(recipe: Recipe) -> dict[str, float]:
    """Return the mean length of a sequence of each training stage, without limits in time."""
    sets = {}
    for name, wanted in (recipe.generate.sets if recipe.generate else {}).items():
        last = writings(name, wanted)[-1]
        sets[name] = (last.rows, last.prompt + last.tokens)
    found = {}
    for stage, config in recipe.training_stages().items():
        read = [sets[s.name] for s in config.sources if s.name in sets]
        rows = sum(count for count, _ in read)
        found[stage] = float(config.seq_length)
        if stage == "align" and rows:
            mean = sum(count * tokens for count, tokens in read) / rows
            found[stage] = min(found[stage], mean)
    return found
