"""What every stage's estimate starts from: the recipe, two shapes, a machine; and shared costs."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from fastdraft_hf.plan.hardware import HOST_BANDWIDTH, HOST_FLOPS, Hardware
from fastdraft_hf.plan.machines import Machine, Measured
from fastdraft_hf.plan.shapes import Shape
from fastdraft_hf.recipe import Recipe

# Seconds that a stage takes whatever its size: loading, reading text, writing files. Measured on
# two CPU cores with the embedded target (docs/plan.md).
FIXED = {
    "design": 1.5,
    "generate": 5.0,
    "logits": 4.0,
    "pretrain": 3.0,
    "continue": 3.0,
    "align": 3.0,
    "reduced_vocabulary": 3.0,
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


@dataclass
class Job:
    """A recipe on some hardware, gone through stage by stage: training uses what generation leaves.

    Attributes:
        recipe: the recipe, as it is resolved for the hardware.
        target, draft: their shapes.
        hardware: what it runs on.
        machine: how fast that is.
        chance: that a place's drafted token is accepted, α (`acceptance.chance_of`).
        export_ready: the target's OpenVINO folder exists.
        folder: the run's, to find finished stages in.
        sets: rows, prompt and completion tokens by set, as generation leaves them.
    """

    recipe: Recipe
    target: Shape
    draft: Shape
    hardware: Hardware
    machine: Machine
    chance: float
    export_ready: bool = True
    folder: Path | None = None
    sets: dict[str, tuple[float, float, float]] = field(default_factory=dict)

    @property
    def cpu(self) -> bool:
        return self.hardware.device is None

    @property
    def on_host(self) -> bool:
        """Whether stages that decode use the CPU beside the accelerators."""
        return not self.cpu and not self.hardware.cuda

    @property
    def decoder(self) -> Machine:
        """What the stages run on that read and decode with this package's own code."""
        return Measured(HOST_FLOPS, HOST_BANDWIDTH) if self.on_host else self.machine

    @property
    def decoder_notes(self) -> tuple[str, ...]:
        return ("on the host's CPU: the memory is the machine's",) if self.on_host else ()

    def weights(self, shape: Shape) -> float:
        """Return the bytes of a model as it is run: float32 on a CPU, bfloat16 elsewhere."""
        return shape.parameters * (4.0 if self.cpu else 2.0)

    def decoder_weights(self, shape: Shape) -> float:
        """Return the same for `decoder`."""
        return shape.parameters * 4.0 if self.on_host else self.weights(shape)

    def resident(self, size: float) -> float:
        """Return the memory of a process that holds ``size`` bytes."""
        return size + (BASE_MEMORY if self.cpu else 0.5e9)


def loading(*shapes: Shape) -> float:
    """Return the seconds that reading weights from disk takes."""
    return sum(shape.parameters * 4.0 for shape in shapes) / LOAD_BANDWIDTH
