"""What a plan says: a line a stage, what the draft should bring, and on which assumptions."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from fastdraft_hf.plan.commands import Command


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
    commands: tuple[Command, ...] = field(default=())

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
