"""How fast the parts of a recipe run: by roofline, or as measured on this machine's CPU."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from fastdraft_hf.eval.bench import Setting
from fastdraft_hf.plan.hardware import Hardware, Utilisation
from fastdraft_hf.plan.shapes import Shape

# What reading for logits takes beside reading prompts: fp16 instead of int8, the head at every
# token of the answers, and their top k (2,900 and 4,100 tokens/s on two cores).
_LOGITS_OF_PROMPT_RATE = 0.7
# OpenVINO over PyTorch: benchmarks/generation.py --only logits.
_OPENVINO_READS = 1.9


class Machine(Protocol):
    """Seconds and rates of single pieces of work."""

    def train_rate(self, stage: str, shape: Shape, flops: float) -> float:
        """Return tokens/s of a training stage whose tokens cost ``flops`` each."""
        ...

    def write_seconds(self, shape: Shape, rows: float, prompt: float, tokens: float) -> float:
        """Return how long the target takes to write ``rows`` texts through the engine."""
        ...

    def row_seconds(self, shape: Shape, tokens: float) -> float:
        """Return how long one text takes among a full batch: what a limit overshoots by."""
        ...

    def read_rate(self, shape: Shape, context: float, *, openvino: bool = False) -> float:
        """Return tokens/s the target reads, logits made; through OpenVINO, where a CPU does."""
        ...

    def round_seconds(self, target: Shape, draft: Shape, setting: Setting) -> float:
        """Return the time of one forward pass of the target and of the drafting before it."""
        ...

    def prompt_seconds(self, target: Shape, tokens: float, setting: Setting) -> float:
        """Return the time to the first token of one answer."""
        ...


@dataclass(frozen=True)
class Roofline:
    """Accelerators: what bounds a piece of work, its FLOPs or the bytes it reads.

    Attributes:
        hardware: one kind of device.
        utilisation: assumed shares of its peaks.
        batch_size: texts written at once on a device.
        engine: ``transformers`` waits for the longest text of a batch and launches every kernel;
            others are taken for servers.
        length_share: mean over longest text, what waiting leaves.
    """

    hardware: Hardware
    utilisation: Utilisation = field(default_factory=Utilisation)
    batch_size: int = 64
    engine: str = "transformers"
    length_share: float = 0.75

    def _peaks(self) -> tuple[float, float]:
        assert self.hardware.device is not None
        return self.hardware.device.flops, self.hardware.device.bandwidth

    def _overhead(self, layers: int) -> float:
        share = 1.0 if self.engine == "transformers" else 0.1
        return share * self.utilisation.layer_overhead * layers

    def train_rate(self, stage: str, shape: Shape, flops: float) -> float:
        peak, _ = self._peaks()
        return self.hardware.count * peak * self.utilisation.train / flops

    def _step(self, shape: Shape, texts: float, context: float) -> float:
        """Return one decoding step of ``texts`` at once, bfloat16 weights."""
        peak, bandwidth = self._peaks()
        bytes_read = 2.0 * shape.read_parameters + texts * context * shape.cache_bytes()
        flops = texts * shape.forward_flops(context)
        return max(
            bytes_read / (bandwidth * self.utilisation.bandwidth),
            flops / (peak * self.utilisation.prefill),
        ) + self._overhead(shape.layers)

    def write_seconds(self, shape: Shape, rows: float, prompt: float, tokens: float) -> float:
        each = rows / self.hardware.count
        texts = min(self.batch_size, max(each, 1.0))
        share = self.length_share if self.engine == "transformers" else 1.0
        steps = each / texts * tokens / share
        reading = each * prompt / self.read_rate(shape, prompt / 2)
        return steps * self._step(shape, texts, prompt + tokens / 2) + reading

    def row_seconds(self, shape: Shape, tokens: float) -> float:
        return tokens * self._step(shape, self.batch_size, tokens / 2)

    def read_rate(self, shape: Shape, context: float, *, openvino: bool = False) -> float:
        peak, _ = self._peaks()
        return peak * self.utilisation.prefill / shape.forward_flops(context)

    def round_seconds(self, target: Shape, draft: Shape, setting: Setting) -> float:
        context = 256.0
        gamma = setting.num_assistant_tokens
        drafting = gamma * self._step(draft, 1, context)
        if setting.path == "prompt-lookup":
            drafting = 0.0
        return self._step(target, 1 + gamma, context) + drafting

    def prompt_seconds(self, target: Shape, tokens: float, setting: Setting) -> float:
        return max(tokens / self.read_rate(target, tokens / 2), self._step(target, 1, tokens))


@dataclass(frozen=True)
class Measured:
    """This machine's CPU: measured where the recipe's own step could be run, else scaled from it.

    Attributes:
        flops: of float32 products at the target's width, FLOP/s.
        bandwidth: bytes/s of reading memory.
        training: tokens/s by stage.
        write_rate: tokens/s of the engine, a full batch at a middling context.
        prompt_rate: prompt tokens/s of the engine.
        batch_size: texts in flight.
        rounds: seconds a round by (path, γ), accepted tokens none.
        first_token: seconds to read ``first_token_prompt`` tokens and write one.
        notes: what was measured, for the output.
    """

    flops: float
    bandwidth: float
    training: dict[str, float] = field(default_factory=dict)
    write_rate: float | None = None
    prompt_rate: float | None = None
    batch_size: int = 64
    rounds: dict[tuple[str, int], float] = field(default_factory=dict)
    first_token: float | None = None
    first_token_prompt: int = 1
    notes: tuple[str, ...] = ()

    def train_rate(self, stage: str, shape: Shape, flops: float) -> float:
        return self.training.get(stage, 0.5 * self.flops / flops)

    def write_seconds(self, shape: Shape, rows: float, prompt: float, tokens: float) -> float:
        rate = self.write_rate or self._batched_rate(shape)
        reading = self.prompt_rate or self.flops / shape.forward_flops(prompt / 2)
        return rows * (tokens / rate + prompt / reading)

    def _batched_rate(self, shape: Shape) -> float:
        step = max(
            shape.read_parameters / self.bandwidth,
            self.batch_size * shape.forward_flops(128) / self.flops,
        )
        return self.batch_size / step

    def row_seconds(self, shape: Shape, tokens: float) -> float:
        return tokens * self.batch_size / (self.write_rate or self._batched_rate(shape))

    def read_rate(self, shape: Shape, context: float, *, openvino: bool = False) -> float:
        if openvino and self.prompt_rate is not None:
            return _LOGITS_OF_PROMPT_RATE * self.prompt_rate
        rate = 0.6 * self.flops / shape.forward_flops(context)
        return _OPENVINO_READS * rate if openvino else rate

    def round_seconds(self, target: Shape, draft: Shape, setting: Setting) -> float:
        gamma = setting.num_assistant_tokens
        known = {g: s for (path, g), s in self.rounds.items() if path == setting.path}
        if known:
            return _between(known, gamma)
        weight = 1 if "openvino" in setting.path else 4  # bytes: int8 and float32
        reading = target.read_parameters + gamma * draft.read_parameters
        # Verifying several tokens costs a few per cent each where memory is the bound.
        return weight * reading / (0.6 * self.bandwidth) * (1 + 0.05 * gamma)

    def prompt_seconds(self, target: Shape, tokens: float, setting: Setting) -> float:
        if "openvino" in setting.path and self.prompt_rate is not None:
            return tokens / self.prompt_rate
        if self.first_token is not None:
            return self.first_token * tokens / self.first_token_prompt
        return tokens / self.read_rate(target, tokens / 2)


def _between(known: dict[int, float], gamma: int) -> float:
    """Return the line through the smallest and largest γ that were measured, at ``gamma``."""
    if gamma in known or len(known) == 1:
        return known.get(gamma, next(iter(known.values())))
    drafted = {g: s for g, s in known.items() if g > 0} or known
    low, high = min(drafted), max(drafted)
    if low == high:
        return drafted[low]
    slope = (drafted[high] - drafted[low]) / (high - low)
    return max(1e-6, drafted[low] + slope * (gamma - low))
