"""Devices, and how long a model's step takes on them.

A step takes as long as its FLOPs or the bytes it reads, whichever is longer, at an assumed share of
the device's peak.
"""

import os
import re
from dataclasses import dataclass, replace
from typing import Any

from fastdraft_hf._errors import FastDraftError, nearest
from fastdraft_hf.draft.families import (
    count_parameters,
    head_groups,
    head_size,
    read_parameters,
)

# int8 through OpenVINO over float32 through PyTorch, on a CPU: benchmarks/generation.py.
OPENVINO_SPEEDUP = 1.9
CONTEXT = 256  # tokens in the cache at a decoding step
# Time of a pass over several tokens, relative to one: stock assisted generation on a CPU.
FEW_ROWS = 1.8
# OpenVINO int8 on a CPU, for three targets and their drafts: what each further token adds to a
# pass over one, the seconds of a pass besides what it reads, and of GenAI's sampler for a logit.
ONE_MORE_ROW, PASS_SECONDS, LOGIT_SECONDS = 0.07, 5e-4, 4e-9
# What the optimizer's step moves, for each parameter: weight, gradient, moments, zeros.
OPTIMIZER_BYTES = 52.0
# A training step's Python, Muon and logging.
STEP_SECONDS = 0.05


@dataclass(frozen=True)
class Shape:
    """A model's size.

    Attributes:
        parameters: all, a tied head once; ``read``: those that a step reads, without embeddings.
        layers, width, inner, key: layers, hidden size, feed-forward size, width of all key heads.
        vocabulary: logits of a token; a reduced head has them all in OpenVINO.
    """

    parameters: int
    read: int
    layers: int
    width: int
    inner: int
    key: int
    vocabulary: int

    def flops(self, context: float) -> float:
        """Return the FLOPs of one token's forward pass: 2N, and attention over ``context`` tokens.

        See Kaplan et al. 2020, arXiv 2001.08361, section 2.1. Training takes three times as many.
        """
        return 2.0 * self.read + 4.0 * self.layers * self.width * context

    def cache_bytes(self, element: float) -> float:
        """Return the bytes of one token in the KV cache."""
        return 2.0 * self.layers * self.key * element


def shape_of(config: Any, scored: int | None = None) -> Shape:
    """Return the shape of a config's model whose head scores some tokens; no weights are made."""
    text = config.get_text_config()
    return Shape(
        parameters=count_parameters(config),
        read=read_parameters(config, scored),
        layers=text.num_hidden_layers,
        width=text.hidden_size,
        inner=text.intermediate_size,
        key=head_groups(text) * head_size(text),
        vocabulary=text.vocab_size,
    )


@dataclass(frozen=True)
class Machine:
    """Devices of one kind.

    Attributes:
        flops: peak of dense bfloat16 products (on a CPU: float32), FLOP/s of one device.
        bandwidth, memory: bytes/s and bytes of one device; no memory on a CPU.
        source: of the figures.
        cuda: whether PyTorch calls it ``cuda`` (NVIDIA, and AMD by ROCm).
        count: devices.
        element: bytes of a weight.
        train, read: shares of ``flops`` reached by training and by reading a text.
        stream: share of ``bandwidth`` reached by decoding.
        launch: seconds per layer and step of eager decoding; a server takes a tenth.
    """

    name: str
    flops: float
    bandwidth: float
    memory: float
    source: str
    cuda: bool = True
    count: int = 1
    element: float = 2.0
    train: float = 0.2
    read: float = 0.4
    stream: float = 0.6
    launch: float = 5e-4

    @property
    def cpu(self) -> bool:
        return not self.memory

    def train_rate(self, draft: Shape, length: float, step: float, scored: int) -> float:
        """Return the tokens/s of one device.

        Args:
            draft: what is trained.
            length: of the sequences.
            step: tokens per step of this device.
            scored: ids that the head scores (`sampled_softmax`).
        """
        unscored = 2.0 * draft.width * (draft.vocabulary - scored)
        compute = 3 * (draft.flops(length / 2) - unscored) / (self.flops * self.train)
        update = OPTIMIZER_BYTES * draft.parameters / (self.bandwidth * self.stream)
        return 1 / (compute + (update + STEP_SECONDS) / step)

    def read_rate(self, target: Shape, context: float, engine: str = "") -> float:
        """Return the tokens/s that one device reads."""
        speedup = OPENVINO_SPEEDUP if "openvino" in engine else 1.0
        return speedup * self.flops * self.read / target.flops(context)

    def step(self, shape: Shape, texts: float, context: float, engine: str = "") -> float:
        """Return the time of one decoding step of ``texts`` at once on one device."""
        element, speedup, started = self.element, 1.0, 0.0
        if "openvino" in engine:
            element, speedup = 1.0, OPENVINO_SPEEDUP
            started = PASS_SECONDS + LOGIT_SECONDS * texts * shape.vocabulary
        read = element * shape.read + texts * context * shape.cache_bytes(element)
        flops = texts * shape.flops(context) / speedup
        bound = max(read / (self.bandwidth * self.stream), flops / (self.flops * self.read))
        return started + bound + shape.layers * self.launch * (0.1 if engine == "vllm" else 1.0)

    def round_seconds(self, target: Shape, draft: Shape, path: str, gamma: int) -> float:
        """Return the time of drafting γ tokens and of the target's pass over them."""
        drafts = 0 if "lookup" in path else gamma
        verified = self.step(target, 1 + gamma, CONTEXT, path)
        if self.cpu and gamma and path in ("transformers", "prompt-lookup"):
            verified *= FEW_ROWS
        elif self.cpu and "openvino" in path:
            verified *= 1 + ONE_MORE_ROW * gamma
        return verified + drafts * self.step(draft, 1, CONTEXT, path)

    def assumptions(self) -> list[str]:
        """Return the machine's figures as sentences."""
        kind = "float32" if self.cpu else f"bfloat16, {self.memory / 1e9:,.0f} GB"
        lines = [
            f"{self.name}: {self.flops / 1e12:,.3g} TFLOP/s {kind} at {self.bandwidth / 1e12:.3g} "
            f"TB/s ({self.source})",
            f"shares of the peaks: training {self.train:g}, reading {self.read:g}, memory "
            f"bandwidth {self.stream:g}; {self.launch * 1e3:g} ms per layer and step of eager "
            "decoding",
        ]
        if self.cpu:
            lines.append(
                f"in stock assisted generation a pass over several tokens takes {FEW_ROWS:g} times "
                f"as long as over one; OpenVINO int8 is {OPENVINO_SPEEDUP:g} times as fast as "
                f"PyTorch where FLOPs decide, starts a pass in {PASS_SECONDS * 1e3:g} ms, samples "
                f"in {LOGIT_SECONDS * 1e9:g} ns per logit, and a further token adds "
                f"{ONE_MORE_ROW:.0%} to a pass"
            )
        elif not self.cuda:
            lines.append(
                f"{self.name} is not a CUDA device: vLLM servers write the texts; logits, evaluate "
                "and bench run on the host's CPU, which takes longer than planned"
            )
        return lines


# TFLOP/s without sparsity, GB and TB/s of memory.
DEVICES = {
    name: Machine(name, tera * 1e12, rate * 1e12, size * 1e9, source, not name.startswith("Gaudi"))
    for name, tera, size, rate, source in (
        ("A100", 312, 80, 2.039, "NVIDIA A100 data sheet, 80 GB SXM"),
        ("H100", 989, 80, 3.35, "NVIDIA H100 data sheet, SXM"),
        ("H200", 989, 141, 4.8, "NVIDIA H200 data sheet, SXM"),
        ("B200", 2250, 180, 8.0, "NVIDIA DGX B200 data sheet, an eighth of it"),
        ("L40S", 362, 48, 0.864, "NVIDIA L40S data sheet"),
        ("RTX4090", 165, 24, 1.008, "NVIDIA Ada architecture whitepaper, table 2"),
        ("RTX3090", 71, 24, 0.936, "NVIDIA Ampere GA102 whitepaper, table 9"),
        ("MI300X", 1307, 192, 5.3, "AMD Instinct MI300X data sheet"),
        ("Gaudi2", 432, 96, 2.45, "Intel Gaudi 2 white paper"),
        ("Gaudi3", 1678, 128, 3.67, "Intel Gaudi 3 white paper, HL-325L"),
    )
}


def cpu_machine(cores: int | None = None) -> Machine:
    """Return a CPU in float32; by default with this machine's cores."""
    cores = cores or os.cpu_count() or 1
    source = f"{cores} cores of 0.1 TFLOP/s and 0.01 TB/s each, as measured on two of an AMD EPYC"
    peaks = 1e11 * cores, 1e10 * cores
    return Machine("CPU", *peaks, 0, source, False, element=4, train=0.4, read=0.8, launch=0)


def parse_hardware(text: str) -> Machine:
    """Read ``8xH100``, ``Gaudi2`` or ``cpu``.

    Raises:
        FastDraftError: there is no such device.
    """
    if text.lower() == "cpu":
        return cpu_machine()
    match = re.fullmatch(r"(?:([1-9]\d*)\s*[x×])?\s*([a-z]\w*)", text.strip().lower())
    names = {name.lower(): name for name in DEVICES}
    if match is None or match[2] not in names:
        hint = nearest(match[2] if match else text.lower(), [*names, "cpu"])
        raise FastDraftError(
            f"--hardware: '{text}' is not known{hint}; cpu, or a number and one of "
            f"{', '.join(DEVICES)}, such as 8xH100"
        )
    return replace(DEVICES[names[match[2]]], count=int(match[1] or 1))
