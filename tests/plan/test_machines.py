"""Rooflines."""

from __future__ import annotations

import pytest

from fastdraft_hf.eval.bench import Setting
from fastdraft_hf.plan.hardware import Utilisation, parse_hardware
from fastdraft_hf.plan.machines import Roofline
from fastdraft_hf.plan.shapes import Shape


class TestRoofline:
    shape = Shape(
        parameters=7_000_000_000,
        layer_parameters=6_500_000_000,
        head_parameters=500_000_000,
        layers=32,
        width=4096,
        inner=14336,
        query=4096,
        key=1024,
        vocabulary=128_000,
    )

    def test_one_text_is_bound_by_memory_and_many_by_flops(self) -> None:
        hardware = parse_hardware("1xH100")
        machine = Roofline(hardware, Utilisation(layer_overhead=0), engine="vllm")
        one = machine.round_seconds(self.shape, self.shape, Setting("alone"))
        assert one == pytest.approx(2 * 7e9 / (3.35e12 * 0.6), rel=0.01)
        seconds = Roofline(
            hardware, Utilisation(layer_overhead=0), batch_size=4096, engine="vllm"
        ).write_seconds(self.shape, 4096, 1, 2)
        flops = 4096 * 2 * self.shape.forward_flops(2) + 4096 * self.shape.forward_flops(0.5)
        assert seconds == pytest.approx(flops / (989e12 * 0.4), rel=0.05)

    def test_waiting_for_the_longest_and_launching_kernels_cost(self) -> None:
        hardware = parse_hardware("1xH100")
        server = Roofline(hardware, engine="vllm").write_seconds(self.shape, 640, 100, 200)
        eager = Roofline(hardware).write_seconds(self.shape, 640, 100, 200)
        assert eager > 2 * server
