"""Tokens, time, memory and disk of every stage of a recipe, and the expected speed-up.

All of it is arithmetic. The assumptions are printed with the plan.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastdraft_hf.data.config import GeneratedSet
from fastdraft_hf.data.target_logits import BATCH_TOKENS, stored_bytes
from fastdraft_hf.draft.design import design_draft
from fastdraft_hf.eval import bench
from fastdraft_hf.eval.metrics import acceptance_of_rate, expected_block_efficiency, mbsu
from fastdraft_hf.export.openvino import openvino_available, openvino_obstacle
from fastdraft_hf.hub.folder import earlier_training
from fastdraft_hf.plan.machines import Machine, Shape, shape_of
from fastdraft_hf.recipe import Recipe, distribution_source
from fastdraft_hf.stages.deadline import planned_minutes
from fastdraft_hf.stages.reduced_vocabulary import LEAST
from fastdraft_hf.stages.runner import STAGES, planned
from fastdraft_hf.target.resolve import load_config, resolve_target
from fastdraft_hf.train.callbacks import OVERHEAD

# By kind of set: mean over longest length of a completion, and tokens of a prompt.
LENGTH_SHARE = {"free": 0.86, "magpie": 0.75, "code": 0.58, "passages": 0.58}
PROMPT_TOKENS = {"free": 1.0, "magpie": 85.0, "code": 70.0, "passages": 90.0}
LENGTH_SHARE |= dict.fromkeys(("dataset", "traffic"), 0.75)
PROMPT_TOKENS |= dict.fromkeys(("dataset", "traffic"), 120.0)
# Magpie's instructions: tokens before them, mean over longest length, share the filters keep.
TYPICAL_INSTRUCTION = 128  # the limit that most targets' instructions get
INSTRUCTION_PREFIX, INSTRUCTION_SHARE, KEPT_INSTRUCTIONS = 30.0, 0.52, 0.74
EVALUATION_PROMPT = 150
OCCURRING = 2000  # ids in the text of a training step
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
    "our loop copies nothing: where a text repeats itself it is faster",
)


@dataclass
class StagePlan:
    """What one stage costs.

    Attributes:
        tokens: trained on, written, read or decoded.
        seconds: wall time.
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
    notes: list[str] = field(default_factory=list)


def assumed_acceptance(tokens: float) -> float:
    """Return the acceptance rate at γ = 3 of a draft that has read so many tokens.

    Between the quickstart's from nothing, and the paper's mean of Dolly and HumanEval for
    Phi-3-mini 50M.
    """
    share = math.log(max(tokens, 0.64e6) / 0.64e6) / math.log(12.5e9 / 0.64e6)
    return round(0.134 + (0.466 - 0.134) * min(1.0, share), 3)


def _passes(name: str, wanted: GeneratedSet) -> list[tuple[str, float, float, float]]:
    """Return the target's passes over a set: name, rows, prompt and completion tokens."""
    rows, found = float(wanted.rows), []
    if wanted.kind == "magpie":
        length = INSTRUCTION_SHARE * (wanted.max_instruction_tokens or TYPICAL_INSTRUCTION)
        found.append((f"{name}/instructions", rows, INSTRUCTION_PREFIX, length))
        rows *= KEPT_INSTRUCTIONS
    every = wanted.temperatures_per_prompt == "all"
    rows *= len(wanted.temperatures) if every else 1
    length = LENGTH_SHARE[wanted.kind] * wanted.max_new_tokens
    return [*found, (name, rows, PROMPT_TOKENS[wanted.kind], length)]


class Plan:
    """What a recipe costs on some hardware, and what its draft should bring.

    Args:
        recipe: as resolved for the machine's device. Of its target, config.json is enough.
        machine: from `parse_hardware`.
        acceptance: rate at γ = 3, above 0 and below 1; by default from the token budget.

    Attributes:
        stages: a line for every stage the recipe has, in order.
        gains: what each γ should bring at that acceptance.
        assumptions: all that is assumed, as sentences.
    """

    def __init__(self, recipe: Recipe, machine: Machine, acceptance: float | None = None) -> None:
        folder = resolve_target(recipe.target, recipe.target_revision, weights=False).path
        config, given = load_config(folder, "target"), recipe.design.draft
        draft = load_config(given, "design.draft") if given else design_draft(config, recipe.design)
        self.recipe, self.machine = recipe, machine
        self.target, self.draft = shape_of(config), shape_of(draft)
        self.reduced = self.draft  # where a reduced vocabulary is used
        if (section := recipe.reduced_vocabulary) is not None:
            kept = section.draft_vocab_size or min(LEAST, self.draft.vocabulary)
            self.reduced = shape_of(draft, kept)
        self.limits = planned_minutes(recipe, round(self.target.parameters))
        self.assumptions = [*machine.assumptions(), *ASSUMPTIONS]
        obstacle = openvino_obstacle(folder) if machine.cpu else None
        self.openvino = machine.cpu and obstacle is None
        if obstacle is not None:
            self.assumptions.insert(0, f"PyTorch writes and measures: {obstacle}")
        if machine.count > 1:
            parallel = ", ".join(name for name, stage in STAGES.items() if stage.parallel)
            self.assumptions.append(f"time divides by {machine.count} in {parallel}")
        # Rows, prompt and completion tokens of the sets that are generated.
        self.sets: dict[str, tuple[float, float, float]] = {}
        self.stages: list[StagePlan] = []
        learns, measures = recipe.training_stages(), ("evaluate", "bench")
        names = planned(recipe)
        for name in [one for one in names if one not in measures]:
            self._add(name, self._train if name in learns else getattr(self, f"_{name}", None))
        if acceptance is None:
            tokens = sum(line.tokens for line in self.stages if line.stage in learns)
            if given and (earlier := earlier_training(Path(given))):
                tokens += earlier["tokens"]
            acceptance = assumed_acceptance(tokens)
            self.assumptions.insert(
                0,
                f"acceptance rate at γ = 3: {acceptance:g}, by the logarithm of the tokens that "
                "the draft reads, between the quickstart's 0.134 at 0.64M from nothing and the "
                "paper's 0.466 at 12.5B",
            )
        self.acceptance = acceptance
        # The chance that a drafted token is accepted.
        self.alpha = acceptance_of_rate(acceptance, 3)
        for name in [one for one in names if one in measures]:
            self._add(name, getattr(self, f"_{name}"))
        self.stages.sort(key=lambda line: names.index(line.stage))
        self.gains = self._gains()

    def _add(self, name: str, estimate: Callable[[StagePlan], None] | None) -> None:
        line = StagePlan(name, seconds=FIXED.get(name, 3.0))
        line.devices = self.machine.count if STAGES[name].parallel else 1
        line.disk_bytes = 4.0 * self.draft.parameters
        if estimate is not None:
            estimate(line)
        self.stages.append(line)

    def _limit(self, part: str) -> float:
        return 60 * (self.limits[part] or math.inf)

    def _loads(self, line: StagePlan, *shapes: Shape, element: float = 0) -> None:
        size = sum(shape.parameters for shape in shapes)
        line.seconds += 4.0 * size / LOAD_BANDWIDTH
        line.memory_bytes += (element or self.machine.element) * size

    def _engine(self, wanted: str) -> str:
        if wanted == "auto" and self.machine.cpu:
            return "openvino" if self.openvino else "transformers"
        return wanted if self.machine.cpu or self.machine.cuda else "vllm"

    def _design(self, line: StagePlan) -> None:
        if self.recipe.design.init != "scratch" and self.recipe.design.draft is None:
            self._loads(line, self.target, element=4.0)

    def _generate(self, line: StagePlan) -> None:
        config, devices = self.recipe.generate, self.machine.count
        assert config is not None
        engine, batch = "vllm" if config.server else self._engine(config.engine), config.batch_size
        for name, wanted in config.sets.items():
            kept = 1.0  # share of the instructions that a time limit left
            for path, rows, prompt, length in _passes(name, wanted):
                label = path.replace("/", "-")
                rows *= kept
                # transformers waits for the longest completion of a batch.
                waits = engine in ("auto", "transformers")
                steps = length / (LENGTH_SHARE[wanted.kind] if waits else 1)
                texts = min(batch, max(rows / devices, 1.0))
                step = self.machine.step(self.target, texts, prompt + steps / 2, engine)
                reading = prompt / self.machine.read_rate(self.target, prompt / 2, engine)
                took = rows / devices * (reading + steps * step / texts)
                took *= wanted.kind != "traffic"  # that is there already
                limit = self._limit(f"generate.{label}")
                if took > limit:
                    kept, rows, took = kept * limit / took, rows * limit / took, limit
                    line.notes.append(f"{label}: cut to {rows:,.0f} rows by the time limit")
                line.seconds += took
                line.tokens += rows * length
                self.sets[path] = (rows, prompt, length)
        self._loads(line, self.target, element=1.0 if engine == "openvino" else 0)
        longest = max((w.max_new_tokens + 200 for w in config.sets.values()), default=0)
        cache = batch * longest * self.target.cache_bytes(self.machine.element)
        line.memory_bytes += 1.7e9 if engine == "openvino" else cache  # GenAI's cache and buffers
        line.disk_bytes = 4.0 * line.tokens

    def _logits(self, line: StagePlan) -> None:
        config = self.recipe.logits
        assert config is not None
        read = [self.sets[name] for name in config.sets]
        line.tokens = sum(count * (prompt + length) for count, prompt, length in read)
        # Slower than reading prompts: the head and its top k, and fp16 instead of int8.
        rate = 0.7 * self.machine.read_rate(self.target, 128, self._engine(config.engine))
        line.seconds += line.tokens / rate / line.devices
        self._loads(line, self.target)
        line.memory_bytes += BATCH_TOKENS * self.target.width * 20.0
        written = round(sum(count * length for count, _, length in read))
        line.disk_bytes = stored_bytes(written, config.top_k, self.target.vocabulary)

    def _train(self, line: StagePlan) -> None:
        name, config = line.stage, self.recipe.training_stages()[line.stage]
        length = float(config.max_length)
        read = [self.sets[source.name] for source in config.sources if source.name in self.sets]
        if name == "align" and read:
            tokens = sum(count * (prompt + length) for count, prompt, length in read)
            length = min(length, tokens / sum(count for count, _, _ in read))
        online = distribution_source(self.recipe, name) == "online"
        step = config.per_device_train_batch_size * config.gradient_accumulation_steps * length
        scored = self.draft.vocabulary
        if config.sampled_softmax and not online:
            scored = min(scored, config.sampled_softmax + OCCURRING)
        rate = line.devices * self.machine.train_rate(self.draft, length, step, scored)
        if online:
            own = 3 * self.draft.flops(length / 2)
            rate *= own / (own + self.target.flops(length / 2))
            self._loads(line, self.target)
            line.notes.append("with the target's distribution, online")
        line.tokens = float(config.max_train_tokens)
        limit = self._limit(name) * rate
        if line.tokens > limit:
            line.tokens = limit
            line.notes.append(f"cut to {limit:,.0f} tokens by the time limit")
        evaluations = math.ceil(line.tokens / step / line.devices / config.save_steps)
        evaluated = evaluations * config.eval_rows * length / line.devices
        evaluated *= self.draft.flops(length / 2) / (self.machine.flops * self.machine.train)
        line.seconds += line.tokens / rate
        line.seconds += min(evaluated, OVERHEAD * line.tokens / rate)
        # Weights, gradients and two moments in float32, activations, a chunk of the head's logits.
        each = self.draft.layers * (14 * self.draft.width + 4 * self.draft.inner)
        line.memory_bytes += 16.0 * self.draft.parameters + 1536 * self.draft.vocabulary
        batch = step / config.gradient_accumulation_steps
        line.memory_bytes += batch * each * self.machine.element
        # Two checkpoints, and ids of 4 bytes unless they are streamed.
        line.disk_bytes += 24.0 * self.draft.parameters
        line.disk_bytes += 0.0 if name != "align" and config.streams else 4.0 * line.tokens

    def _export(self, line: StagePlan) -> None:
        config, forms = self.recipe.export, [*self.recipe.export.openvino, *self.recipe.export.gguf]
        line.seconds = EXPORT * len(config.openvino) + 3.0 * len(forms)
        line.disk_bytes = self.draft.parameters * sum(FORM_BYTES.get(f, 2.0) for f in forms)
        if config.acceptance_texts:
            self._loads(line, self.target, self.draft)

    def _evaluate(self, line: StagePlan) -> None:
        config = self.recipe.evaluate
        count, gammas = len(config.tasks) * config.prompts_per_task, config.gammas
        drafting = [(config.path, g) for g in gammas * len(config.sampled) + config.greedy_gammas]
        # Sampled answers are read again, for the expected acceptance.
        rows = count * len(gammas) * len(config.sampled)
        read = rows * (EVALUATION_PROMPT + config.max_new_tokens)
        self._decodes(line, read, config.max_new_tokens, [("alone", 0), *drafting], count)

    def _bench(self, line: StagePlan) -> None:
        config = self.recipe.bench
        known = bench.BASELINES if self.openvino else bench.RUNTIMES["pytorch"]
        paths = [path for path in dict.fromkeys(config.paths) if path in known]
        settings = bench.all_settings(bench.assisted_settings(paths, config.num_assistant_tokens))
        answers = [(one.path, one.num_assistant_tokens) for one in settings]
        count = len(config.tasks) * config.prompts_per_task + 1  # one for warm-up and memory
        self._decodes(line, 0, config.max_new_tokens, answers, count)

    def _decodes(
        self, line: StagePlan, read: float, longest: int, answers: list[tuple[str, int]], count: int
    ) -> None:
        """Add ``read`` tokens, and ``count`` answers on each path with γ (0: the target alone)."""
        seconds = read / self.machine.read_rate(self.target, 128)
        for path, gamma in answers:
            tau = expected_block_efficiency(self.alpha, gamma)
            prompt = EVALUATION_PROMPT / self.machine.read_rate(self.target, 75, path)
            seconds += count * (prompt + longest / tau * self._round(path, gamma))
            line.tokens += count * longest
        if (limit := self._limit(line.stage)) < seconds / line.devices:
            line.notes.append("fewer prompts, by the time limit")
            line.tokens *= limit * line.devices / seconds
        line.seconds += min(limit, seconds / line.devices)
        if seconds:
            self._loads(line, self.target, self.draft)

    def _round(self, path: str, gamma: int) -> float:
        draft = self.reduced if path in ("ours", "openvino", "ours-openvino") else self.draft
        return self.machine.round_seconds(self.target, draft, path, gamma)

    def _gains(self) -> list[dict[str, Any]]:
        config, cost = self.recipe.bench, self.draft.parameters / self.target.parameters
        # What is only not installed here can still be what the draft is for.
        openvino = self.openvino or (self.machine.cpu and not openvino_available())
        known = bench.BASELINES if openvino else bench.RUNTIMES["pytorch"]
        paths = [p for p in config.paths or ["ours"] if p in known and "lookup" not in p]
        found = []
        for gamma in sorted({*config.num_assistant_tokens, *self.recipe.evaluate.gammas}):
            tau = expected_block_efficiency(self.alpha, gamma)
            gain: dict[str, Any] = {"num_assistant_tokens": gamma, "block_efficiency": tau}
            alone = {p: self._round(bench.BASELINES[p], 0) for p in paths}
            gain["speed"] = {p: tau * alone[p] / self._round(p, gamma) for p in paths}
            found.append({**gain, "mbsu": mbsu(tau, cost, gamma)})
        return found
