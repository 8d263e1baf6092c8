"""Two processes with half the batch each do what one does with all of it; what is refused."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import scale_out
import torch
from safetensors.torch import load_file
from scale_out import TwoProcesses

from fastdraft_hf.train.checks import check_sharding
from fastdraft_hf.train.trainer import DraftDistillationConfig

TRAINED = [name for name in {**scale_out.SCENARIOS, **scale_out.SHARDED} if name != "non_finite"]


@pytest.fixture(scope="module")
def models(two_processes: TwoProcesses) -> Path:
    return two_processes.models


@pytest.fixture(scope="module")
def two(two_processes: TwoProcesses) -> Path:
    """What every scenario found in two processes."""
    return two_processes.scenarios


def ranks(two: Path, name: str) -> list[dict[str, Any]]:
    found = [json.loads((two / f"{name}.{rank}.json").read_text("utf-8")) for rank in (0, 1)]
    assert [one["processes"] for one in found] == [2, 2]
    return found


@pytest.mark.parametrize("name", TRAINED)
def test_two_processes_are_one(two: Path, models: Path, tmp_path: Path, name: str) -> None:
    one = scale_out.train(name, models, tmp_path)
    assert one["processes"] == 1
    assert one["error"] is None
    for other in ranks(two, name):
        assert other["error"] is None
        assert other["sharded"] is name.startswith("sharded")
        assert other["step"] == one["step"]
        assert other["tokens"] == one["tokens"] > 0  # exactly
        for logged in ("losses", "norms", "acceptance"):
            assert len(other[logged]) == one["step"]
            known = [value for value in one[logged] if value is not None]
            assert other[logged] == (pytest.approx(known, abs=1e-5) if known else one[logged])
        if "evaluated" in other:
            assert other["evaluated"] == pytest.approx(one["evaluated"], abs=1e-5)
    ours = load_file(tmp_path / name / "final" / "model.safetensors")
    theirs = load_file(two / name / "final" / "model.safetensors")
    # FSDP writes a tied head twice.
    assert theirs.keys() - {"lm_head.weight"} == ours.keys() - {"lm_head.weight"}
    for weight, value in ours.items():
        torch.testing.assert_close(theirs[weight], value, rtol=0, atol=1e-5)


def test_a_non_finite_loss_on_one_process_stops_both(two: Path) -> None:
    for found in ranks(two, "non_finite"):
        assert found["error"].startswith(
            "NonFiniteLossError: step 2: the loss is not finite (ce nan) on the rows "
        )
        assert found["step"] == len(found["losses"]) == 1


def arguments(**settings: Any) -> DraftDistillationConfig:
    settings = {"use_muon": False, **settings}
    return DraftDistillationConfig(output_dir="unused", use_cpu=True, bf16=False, **settings)


def test_zero_3_is_refused() -> None:
    args = arguments()
    args.deepspeed_plugin = SimpleNamespace(zero_stage=3)
    with pytest.raises(ValueError, match="ZeRO-3 shards the draft's head"):
        check_sharding(args)
    args.deepspeed_plugin = SimpleNamespace(zero_stage=2)
    check_sharding(args)
    args.use_muon = True
    with pytest.raises(ValueError, match="Muon needs unsharded matrices"):
        check_sharding(args)


def test_the_first_fsdp_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    for version in ("1", None):
        if version is None:
            monkeypatch.delenv("FSDP_VERSION", raising=False)
        else:
            monkeypatch.setenv("FSDP_VERSION", version)
        with pytest.raises(ValueError, match="set fsdp_version: 2"):
            check_sharding(arguments())
    monkeypatch.setenv("FSDP_VERSION", "2")
    check_sharding(arguments())
    with pytest.raises(ValueError, match="Muon needs unsharded matrices"):
        check_sharding(arguments(use_muon=True))
    # The trainer's own arguments take precedence over the launcher's.
    args = arguments()
    args.fsdp_plugin_args = {"fsdp_version": 1}
    with pytest.raises(ValueError, match="set fsdp_version: 2"):
        check_sharding(args)
