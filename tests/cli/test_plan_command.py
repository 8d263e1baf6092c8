"""`fastdraft plan`: the table, the command to run, and refused arguments."""

import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from fastdraft_hf.cli import main as cli
from fastdraft_hf.cli.plan import command
from fastdraft_hf.plan.machines import DEVICES, parse_hardware

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "tests" / "fixtures" / "targets" / "phi-3-mini-4k-instruct.json"
PHI3 = ROOT / "recipes" / "phi-3-mini" / "50m.yaml"


def test_the_command_prints_a_table(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    shutil.copy(CONFIG, tmp_path / "config.json")
    words = ["plan", str(PHI3), "--hardware", "1xRTX4090"]
    words += [f"output_dir={tmp_path}", f"target={tmp_path}"]
    assert cli.main(words) == 0
    said = capsys.readouterr().out
    assert "49,945,088 parameters for 3,821,079,552" in said
    assert "MORE MEMORY THAN A DEVICE HAS" in said  # 256 texts at once do not fit into 24 GB
    assert "RTX4090: 165 TFLOP/s" in said
    assert f"\n  fastdraft run {PHI3} output_dir={tmp_path} target={tmp_path}\n" in said
    assert "γ = 3" in said
    assert cli.main([*words, "--acceptance", "0.5"]) == 0
    assert "at an acceptance rate of 0.5 (γ = 3)" in capsys.readouterr().out


def test_the_plan_of_a_target_alone_is_that_of_its_run(
    tiny_target_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The tiny target has a template for Magpie; without it, its run has no instructions."""
    target = shutil.copytree(tiny_target_folder, tmp_path / "base")
    options = ["--target", str(target), "--params", "20k", "--hours", "1.5"]

    def generated() -> float:
        assert cli.main(["plan", *options, "seed=4"]) == 0
        said = capsys.readouterr().out
        assert f"\n  fastdraft run {shlex.join([*options, 'seed=4'])}\n" in said
        found = re.search(r"^generate +1 +([0-9.]+)([kM])", said, re.MULTILINE)
        assert found is not None
        return float(found[1]) * {"k": 1e3, "M": 1e6}[found[2]]

    instructed = generated()
    (target / "chat_template.jinja").unlink()
    assert generated() < 0.8 * instructed


@pytest.mark.parametrize("name", ["2xRTX4090", "8xH100", "16xA100", "8xGaudi2", "24xGaudi3"])
def test_several_devices_run_the_same_recipe_through_accelerate(name: str) -> None:
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    machine = parse_hardware(name)
    words = shlex.split(command(machine, ["r.yaml", "seed=3"]))
    assert words[:2] == ["accelerate", "launch"]
    words = [{"RANK": "0", "HOST": "10.0.0.1"}.get(word, word) for word in words[2:]]
    words[1] = str(ROOT / words[1])
    args, _, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    assert (args.num_processes, args.training_script) == (machine.count, "recipes/run.py")
    assert args.training_script_args == ["r.yaml", "seed=3"]
    one = replace(DEVICES["H100"], count=1)
    assert command(one, ["r.yaml", "target=a b"]) == "fastdraft run r.yaml 'target=a b'"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--hardware", "9xZ1"], "--hardware: '9xZ1' is not known"),
        (["--hardware", "1xH100", "--acceptance", "0"], "--acceptance: got 0; give a rate"),
    ],
)
def test_bad_arguments_are_one_line(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["plan", str(PHI3), *words]) == 2
    error = capsys.readouterr().err.strip()
    assert said in error
    assert len(error.splitlines()) == 1
