"""`recipes/train.py`, in this process, and the configurations that `accelerate launch` reads."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import scale_out
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastdraft_hf._errors import FastDraftError
from fastdraft_hf.cli import _running
from fastdraft_hf.recipe import build_recipe

RECIPES = Path(__file__).parents[2] / "recipes"
CONFIGS = {
    "one_gpu": (DistributedType.NO, "bf16", 1),
    "multi_gpu": (DistributedType.MULTI_GPU, "bf16", 8),
    "fsdp2": (DistributedType.FSDP, "bf16", 8),
    "deepspeed_zero2": (DistributedType.DEEPSPEED, "bf16", 8),
    "multi_node": (DistributedType.MULTI_GPU, "bf16", 16),
    "gaudi": (DistributedType.MULTI_HPU, "bf16", 8),
    "cpu": (DistributedType.NO, "no", 1),
}


@pytest.mark.parametrize("path", sorted((RECIPES / "accelerate").glob("*.yaml")), ids=str)
def test_accelerate_reads_every_configuration(path: Path) -> None:
    config = load_config_from_file(str(path))  # refuses unknown keys
    kind, precision, processes = CONFIGS[path.stem]
    assert config.distributed_type == kind
    assert config.mixed_precision == precision
    assert config.num_processes == processes
    assert config.num_machines == (2 if path.stem == "multi_node" else 1)
    assert config.use_cpu is (path.stem == "cpu")
    # As the launcher takes them.
    words = ["--config_file", str(path), "train.py"]
    args, _, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    assert args.mixed_precision == precision
    assert args.use_fsdp is (kind == DistributedType.FSDP)
    assert args.use_deepspeed is (kind == DistributedType.DEEPSPEED)
    if args.use_fsdp:
        assert int(args.fsdp_version) == 2
        assert args.fsdp_state_dict_type == "FULL_STATE_DICT"
    if args.use_deepspeed:
        assert args.zero_stage == 2


def test_every_configuration_is_there() -> None:
    assert {path.stem for path in (RECIPES / "accelerate").glob("*.yaml")} == CONFIGS.keys()


@pytest.fixture(scope="module")
def script() -> Any:
    spec = importlib.util.spec_from_file_location("recipes_train", RECIPES / "train.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def config(tmp_path: Path, tiny_target_folder: Path) -> Callable[..., list[str]]:
    """Write what is trained on and a configuration; overrides are added to it."""
    rows = datasets.Dataset.from_list(scale_out.rows(stored=True))
    rows.save_to_disk(str(tmp_path / "disk"))
    datasets.DatasetDict(train=rows, held=rows.select(range(4))).save_to_disk(tmp_path / "splits")
    rows.to_parquet(tmp_path / "rows-0.parquet")
    lines = [json.dumps(row) + "\n" for row in scale_out.rows()]
    (tmp_path / "rows.jsonl").write_text("".join(lines), encoding="utf-8")

    def make(**overrides: Any) -> list[str]:
        settings = {
            "model_name_or_path": str(tiny_target_folder),
            "dataset": str(tmp_path / "disk"),
            "dataset_kwargs": {"skip_prepare_dataset": True},
            "objective": {"ce": 0.5, "kl": 0.5},
            "output_dir": str(tmp_path / "out"),
            "per_device_train_batch_size": 4,
            "max_train_tokens": 120,
            "use_cpu": True,
            "save_steps": 2,
            "report_to": "none",
            "disable_tqdm": True,
            **overrides,
        }
        (tmp_path / "my.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
        return ["--config", str(tmp_path / "my.yaml")]

    return make


def test_it_trains_goes_on_and_ends(
    script: Any, config: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert script.main(config()) == 0
    said = capsys.readouterr().err
    assert "4 rows a step (4 x 1 accumulated x 1 processes), about 40 tokens" in said
    assert "from the start" in said
    folder = tmp_path / "out" / "model"
    AutoTokenizer.from_pretrained(folder)
    AutoModelForCausalLM.from_pretrained(folder)
    first = load_file(folder / "model.safetensors")
    # Killed between the last checkpoint and the draft: nothing is trained a second time.
    (folder / "model.safetensors").unlink()
    assert script.main(config()) == 0
    said = capsys.readouterr().err
    assert "the last checkpoint is the end of the run" in said
    again = load_file(folder / "model.safetensors")
    assert all(torch.equal(again[name], value) for name, value in first.items())
    # A checkpoint that was not finished is no place to go on from.
    last = max((tmp_path / "out").glob("checkpoint-*"), key=lambda p: int(p.name[11:]))
    (last / "complete").unlink()
    assert script.main(config()) == 0
    assert "checkpoint-2\n" in capsys.readouterr().err
    again = load_file(folder / "model.safetensors")
    assert all(torch.equal(again[name], value) for name, value in first.items())
    assert script.main(config(resume=False)) == 2
    assert "out has checkpoints; resume, or give another output_dir" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("dataset", "settings"),
    [
        ("splits", {"eval_split": "held", "eval_strategy": "steps", "eval_steps": 2}),
        ("rows-*.parquet", {"streaming": True, "shuffle_buffer": 1, "eval_size": 4}),
        ("rows.jsonl", {"objective": "ce", "eval_size": 4, "use_peft": True}),
        ("disk", {"streaming": True, "max_steps": 2, "max_train_tokens": None}),
    ],
)
def test_what_it_reads(
    script: Any,
    config: Any,
    tmp_path: Path,
    tiny_target_folder: Path,
    dataset: str,
    settings: dict[str, Any],
) -> None:
    assert script.main(config(dataset=str(tmp_path / dataset), **settings)) == 0
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model").state_dict()
    before = AutoModelForCausalLM.from_pretrained(tiny_target_folder).state_dict()
    assert trained.keys() == before.keys()
    assert any(not torch.equal(trained[name], before[name]) for name in before)
    if "use_peft" in settings:
        table = "model.embed_tokens.weight"
        assert torch.equal(trained[table], before[table])


def test_rows_that_the_target_wrote_and_the_target_itself(
    script: Any, config: Any, tmp_path: Path, tiny_target_folder: Path
) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    written = [
        {
            "prompt_ids": [5, 6, 7 + number],
            "completion_ids": [9, 10, 11 + number, 2],
            "seed": number,
        }
        for number in range(8)
    ]
    datasets.Dataset.from_list(written).to_parquet(folder / "part-00000.parquet")
    settings = {
        "dataset": str(folder / "part-*.parquet"),
        "dataset_kwargs": None,
        "max_train_tokens": 60,
        "teacher_model_name_or_path": str(tiny_target_folder),
    }
    assert script.main(config(**settings)) == 0
    rows, _ = script.train_and_eval(script.ScriptArguments(settings["dataset"]), 0)
    assert rows[1] == {
        "input_ids": [5, 6, 8, 9, 10, 12, 2],
        "labels": [-100, -100, -100, 9, 10, 12, 2],
    }


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"nonsense": 1}, "nonsense"),
        ({"objective": "kll"}, "did you mean 'kl'"),
        ({"learning_rate": "fast"}, "invalid float value: 'fast'"),
        ({"model_name_or_path": "/nowhere"}, "model_name_or_path: there is no /nowhere"),
        ({"dataset": "/nowhere/*.parquet"}, "dataset: no file is called /nowhere/*.parquet"),
        ({"max_train_tokens": 3}, "max_train_tokens 3 is below one batch"),
        ({"load_in_4bit": True}, "not quantised"),
        ({"eval_split": "held", "eval_size": 2}, "eval_split and eval_size"),
    ],
)
def test_bad_input_is_one_line_and_nothing_else(
    script: Any,
    config: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    settings: dict[str, Any],
    said: str,
) -> None:
    assert script.main(config(**settings)) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("train.py")]
    assert len(lines) == 1
    assert said in lines[0]
    assert not (tmp_path / "out").exists()


def test_a_split_that_is_not_there(
    script: Any, config: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert script.main(config(dataset=str(tmp_path / "splits"), dataset_split="dev")) == 2
    assert "no split dev, only train, held" in capsys.readouterr().err
    assert script.main(["--config", str(tmp_path / "none.yaml")]) == 2
    assert "none.yaml" in capsys.readouterr().err


def test_help(script: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        script.main(["--help"])
    assert stop.value.code == 0
    said = capsys.readouterr().out
    assert "accelerate launch" in said
    assert "--dataset DATASET" in said
    assert "--max_train_tokens" in said


def test_stages_refuse_several_processes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    recipe = build_recipe({"target": "some/target", "output_dir": str(tmp_path / "run")})
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(FastDraftError, match=r"one of 4 processes.*recipes/train\.py"):
        _running.run_stages(recipe, None, dry_run=True)
    assert not (tmp_path / "run").exists()


def test_the_example_is_a_configuration(script: Any) -> None:
    """Every setting of it is one of the script's; its data and draft are made by a recipe."""
    path = RECIPES / "train-example.yaml"
    parser = script.Parser(
        (script.ScriptArguments, script.DraftDistillationConfig, script.ModelConfig)
    )
    found, args, model = parser.parse_args_and_config(["--config", str(path), "--use_cpu"])
    assert found.dataset
    assert args.token_budget
    assert model.model_name_or_path
