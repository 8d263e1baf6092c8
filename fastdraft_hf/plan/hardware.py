"""Accelerators as their makers describe them, and what share of that a draft's stages reach."""

from __future__ import annotations

import re
from dataclasses import dataclass

from fastdraft_hf._errors import FastDraftError, nearest


@dataclass(frozen=True)
class Device:
    """One accelerator.

    Attributes:
        name: as it is written in ``--hardware``.
        flops: peak of dense bfloat16 matrix products with float32 sums, FLOP/s.
        memory: bytes.
        bandwidth: of its memory, bytes/s.
        source: where the figures stand.
        cuda: whether PyTorch calls it ``cuda`` (NVIDIA, and AMD by ROCm). On others drafts are
            trained (accelerate) and servers write; this package's decoding uses the CPU there.
    """

    name: str
    flops: float
    memory: float
    bandwidth: float
    source: str
    cuda: bool = True


def _device(
    name: str, tera: float, giga: float, tera_bytes: float, source: str, cuda: bool = True
) -> Device:
    return Device(name, tera * 1e12, giga * 1e9, tera_bytes * 1e12, source, cuda)


# Without sparsity, whose figures are twice as large and which nothing here uses.
DEVICES = {
    device.name: device
    for device in (
        _device("A100", 312, 80, 2.039, "NVIDIA A100 data sheet, 80 GB SXM"),
        _device("H100", 989, 80, 3.35, "NVIDIA H100 data sheet, SXM"),
        _device("H200", 989, 141, 4.8, "NVIDIA H200 data sheet, SXM"),
        _device("B200", 2250, 180, 8.0, "NVIDIA DGX B200 data sheet, an eighth of it"),
        _device("L40S", 362, 48, 0.864, "NVIDIA L40S data sheet"),
        _device("RTX4090", 165, 24, 1.008, "NVIDIA Ada architecture whitepaper, table 2"),
        _device("RTX3090", 71, 24, 0.936, "NVIDIA Ampere GA102 whitepaper, table 9"),
        _device("MI300X", 1307, 192, 5.3, "AMD Instinct MI300X data sheet"),
        _device("Gaudi2", 432, 96, 2.45, "Intel Gaudi 2 white paper", cuda=False),
        _device("Gaudi3", 1678, 128, 3.67, "Intel Gaudi 3 white paper, HL-325L", cuda=False),
    )
}


# The CPU beside accelerators that only train here: one socket of a server, assumed, not measured.
# Float32 products in FLOP/s, and bytes/s of memory (eight channels of DDR4-3200).
HOST_FLOPS, HOST_BANDWIDTH = 2e12, 2e11


@dataclass(frozen=True)
class Utilisation:
    """Assumed shares of the peaks.

    Attributes:
        train: of the FLOP/s while a draft trains. Large models reach 0.4; a draft's matrices are
            narrow, its optimizer and input weigh more.
        prefill: of the FLOP/s while the target reads.
        bandwidth: of the memory bandwidth while the target writes.
        layer_overhead: seconds a layer and step that are spent launching kernels, as eager
            transformers does; a server with captured graphs has a tenth.
    """

    train: float = 0.2
    prefill: float = 0.4
    bandwidth: float = 0.6
    layer_overhead: float = 5e-4


@dataclass(frozen=True)
class Hardware:
    """``count`` devices of one kind; ``device`` is ``None`` for this machine's CPU."""

    count: int
    device: Device | None

    @property
    def cuda(self) -> bool:
        """Whether this package's own decoding runs on it."""
        return self.device is not None and self.device.cuda

    @property
    def name(self) -> str:
        return "cpu" if self.device is None else f"{self.count}x{self.device.name}"


def parse_hardware(text: str) -> Hardware:
    """Read ``8xH100``, ``Gaudi2`` or ``cpu``.

    Raises:
        FastDraftError: no such device.
    """
    if text.lower() == "cpu":
        return Hardware(1, None)
    match = re.fullmatch(r"(?:(\d+)\s*[x×])?\s*([A-Za-z]\w*)", text.strip())
    names = {name.lower(): name for name in DEVICES}
    count = int(match.group(1) or 1) if match else 0
    if match is None or match.group(2).lower() not in names or count < 1:
        word = text.lower().rpartition("x")[2] if match is None else match.group(2).lower()
        raise FastDraftError(
            f"--hardware: '{text}' is not known{nearest(word, [*names, 'cpu'])}; cpu, or a number "
            f"and one of {', '.join(DEVICES)}, such as 8xH100"
        )
    return Hardware(count, DEVICES[names[match.group(2).lower()]])
