"""Names of hardware."""

from __future__ import annotations

import pytest

from fastdraft_hf import FastDraftError
from fastdraft_hf.plan.hardware import DEVICES, Hardware, parse_hardware


class TestHardware:
    @pytest.mark.parametrize(
        ("text", "count", "name"),
        [("8xH100", 8, "H100"), ("gaudi2", 1, "Gaudi2"), ("2×rtx4090", 2, "RTX4090")],
    )
    def test_names(self, text: str, count: int, name: str) -> None:
        found = parse_hardware(text)
        assert found.device is not None
        assert (found.count, found.device.name) == (count, name)
        assert found.name == f"{count}x{name}"

    def test_cpu(self) -> None:
        assert parse_hardware("CPU") == Hardware(1, None)

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("8xH10", r"did you mean 'h100'"),
            ("0xH100", r"is not known"),
            ("lots", r"a number and one of"),
            ("", r"is not known"),
        ],
    )
    def test_others_are_refused(self, text: str, said: str) -> None:
        with pytest.raises(FastDraftError, match=said):
            parse_hardware(text)

    def test_every_device_has_a_source_and_sane_figures(self) -> None:
        for device in DEVICES.values():
            assert device.source
            # FLOPs a byte of bandwidth: between a consumer card and the newest.
            assert 50 < device.flops / device.bandwidth < 600, device.name
