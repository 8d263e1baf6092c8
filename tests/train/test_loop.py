"""Training runs: killed ones resume bit for bit, and nothing is sent over the network."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from safetensors.torch import load_file
from tiny_training import LENGTH, Killed, Make, kill_at, losses, run, same
from tiny_training import section as any_section

from fastdraft_hf._errors import FastDraftError
from fastdraft_hf.train import callbacks
from fastdraft_hf.train.callbacks import newest_complete
from fastdraft_hf.train.config import DraftDistillationConfig
from fastdraft_hf.train.loop import tokens_per_minute
from fastdraft_hf.train.section import LoraSettings, training_section

STEPS = 9


def config(**changes: Any) -> Any:
    return any_section(**{"max_train_tokens": STEPS * 4 * LENGTH, **changes})


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 24), ("eval", 4)):
        blocks = torch.randint(3, 280, (count, LENGTH), generator=generator).tolist()
        rows = [{"input_ids": block, "labels": block} for block in blocks]
        datasets.Dataset.from_list(rows).save_to_disk(str(folder / split))
    return folder


def weights(work: Path) -> dict[str, torch.Tensor]:
    return load_file(work / "model" / "model.safetensors")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_muon": False, "lr_scheduler_type": "linear"},
        {"gradient_accumulation_steps": 2, "max_train_tokens": STEPS * 8 * LENGTH},
        {"sampled_softmax": 7},  # what is drawn must be resumed too
        {"num_parallel_tokens": 3},
    ],
    ids=["muon", "adamw", "accumulated", "sampled", "parallel"],
)
def test_a_killed_run_resumes_bit_for_bit(
    tmp_path: Path,
    start_model: Path,
    tiny_tokenizer: Any,
    data: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
) -> None:
    settings = config(**changes)
    facts = run(start_model, tiny_tokenizer, data, tmp_path / "whole", settings)
    assert facts["steps"] == STEPS
    kills = [1, 5, 8]  # before the first checkpoint, in the middle, near the end
    for kill in kills:
        with monkeypatch.context() as patch:
            kill_at(patch, kill)
            with pytest.raises(Killed):
                run(start_model, tiny_tokenizer, data, tmp_path / "killed", settings)
    assert not (tmp_path / "killed" / "model").exists()
    whole = newest_complete(tmp_path / "killed")
    assert whole is not None
    assert whole.name == "checkpoint-6"
    torn = tmp_path / "killed" / "checkpoint-8"  # what a kill while saving leaves
    torn.mkdir()
    (torn / "trainer_state.json").write_text("{")
    resumed = run(start_model, tiny_tokenizer, data, tmp_path / "killed", settings)
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "killed"))
    assert (resumed["steps"], resumed["tokens"]) == (facts["steps"], facts["tokens"])
    assert losses(resumed) == losses(facts)


def test_weights_are_averaged_with_those_of_the_start(
    tmp_path: Path, start_model: Path, tiny_tokenizer: Any, data: Path
) -> None:
    run(start_model, tiny_tokenizer, data, tmp_path / "trained", config())
    run(start_model, tiny_tokenizer, data, tmp_path / "both", config(start_weight=0.25))
    start, trained = load_file(start_model / "model.safetensors"), weights(tmp_path / "trained")
    both = weights(tmp_path / "both")
    assert both.keys() == trained.keys()
    for name, weight in both.items():
        torch.testing.assert_close(weight, 0.25 * start[name] + 0.75 * trained[name])
    shutil.rmtree(tmp_path / "both" / "model")  # killed before it was saved: not averaged twice
    run(start_model, tiny_tokenizer, data, tmp_path / "both", config(start_weight=0.25))
    assert same(weights(tmp_path / "both"), both)


def test_the_speed_of_training_leaves_nothing_behind(
    start_model: Path, tiny_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = load_file(start_model / "model.safetensors")
    assert tokens_per_minute(start_model, config(), tiny_tokenizer, "cpu") > 0
    assert not list(tmp_path.iterdir())
    assert same(load_file(start_model / "model.safetensors"), before)


def test_killed_after_the_last_checkpoint(
    tmp_path: Path, start_model: Path, tiny_tokenizer: Any, data: Path
) -> None:
    run(start_model, tiny_tokenizer, data, tmp_path, config())
    before = weights(tmp_path)
    shutil.rmtree(tmp_path / "model")  # the checkpoint was written, the model was not
    again = run(start_model, tiny_tokenizer, data, tmp_path, config())
    assert again["steps"] == STEPS  # there was nothing left to train
    assert same(before, weights(tmp_path))


def test_a_minute_budget_can_only_cut(
    tmp_path: Path,
    start_model: Path,
    tiny_tokenizer: Any,
    data: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(callbacks, "_TIMED_STEPS", 3)

    def trained(name: str, **changes: Any) -> Any:
        return run(start_model, tiny_tokenizer, data, tmp_path / name, config(**changes))

    assert trained("a", max_minutes=1e-9)["steps"] == 3  # two that warm up, one that is timed
    trained("b", max_minutes=1e6)
    trained("c")
    assert not (tmp_path / "b" / "plan.json").exists()
    assert same(weights(tmp_path / "b"), weights(tmp_path / "c"))
    # A resumed run makes the same cut at the same step.
    plan = {"max_train_tokens": 7 * 4 * LENGTH, "after_step": 5}
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "plan.json").write_text(json.dumps([plan]))
    facts = trained("whole", max_minutes=1)
    assert facts["steps"] == 7
    for step in (3, 6):
        with monkeypatch.context() as patch:
            kill_at(patch, step)
            with pytest.raises(Killed):
                trained("killed", max_minutes=1)
    assert losses(trained("killed", max_minutes=1)) == losses(facts)
    assert same(weights(tmp_path / "killed"), weights(tmp_path / "whole"))


def test_a_loss_that_explodes(
    tmp_path: Path, start_model: Path, tiny_tokenizer: Any, data: Path, tiny_model: Make
) -> None:
    broken = tiny_model()
    with torch.no_grad():
        broken.model.norm.weight.fill_(float("nan"))
    broken.save_pretrained(tmp_path / "broken")
    settings = config()
    said = r"^pretrain: step 1: the loss is not finite \(ce nan\) on the rows that begin"
    with pytest.raises(FastDraftError, match=said):
        run(tmp_path / "broken", tiny_tokenizer, data, tmp_path / "work", settings)
    assert not (tmp_path / "work" / "model").exists()


def test_the_config_follows_the_section(tmp_path: Path) -> None:
    # A section's defaults are Python's, except for the budget.
    plain = training_section()(sources=[{"kind": "python"}])
    made = plain.trainer_config("out", seed=0, device="cpu")
    usual = DraftDistillationConfig("out", max_train_tokens="1M", seed=0, data_seed=0, use_cpu=True)
    usual.dataloader_pin_memory = False
    skipped = ("logging_dir", "run_name")
    for name, value in usual.to_dict().items():
        if name not in skipped:
            assert made.to_dict()[name] == value, name


def test_what_transformers_refuses_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(FastDraftError, match="sometimes") as caught:
        config(logging_strategy="sometimes").trainer_config(tmp_path, seed=0, device="cpu")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rat": 1}, r"^learning_rat: unknown key \(did you mean 'learning_rate'"),
        ({"head_dtype": "float8"}, "^head_dtype: must be auto"),
        ({"output_dir": "x"}, "^output_dir: not in a recipe; checkpoints go into the stage's"),
        ({"max_steps": 3}, "^max_steps: not in a recipe; the budget is max_train_tokens"),
        ({"deepspeed": "x.json"}, "^deepspeed: .* `accelerate launch`"),
        ({"start_weight": 1.0}, "start_weight: must be at least 0 and below 1, got 1.0"),
        ({"start_weight": 0.5, "lora": LoraSettings()}, "start_weight: adapters keep the weights"),
        ({"max_length": 0}, "max_length: must be at least 1"),
        ({"warmup_steps": 1.0}, "warmup_steps: .* share of the budget"),
        ({"learning_rate": 0.0}, "learning_rate: must be above 0"),
        (
            {
                "lr_scheduler_type": "warmup_stable_decay",
                "lr_scheduler_kwargs": {"num_decay_steps": 0.99},
            },
            r"num_decay_steps: .* leaves room for warmup_steps \(0.03\); got 0.99",
        ),
        ({"temperature": 0.0}, "temperature: must be above 0"),
        ({"max_train_tokens": 31}, r"max_train_tokens: 31 is below one step of 32 tokens"),
    ],
)
def test_sections_refuse_nonsense(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(FastDraftError, match=message):
        config(**changes)


# What a user's own process does: transformers is long imported when training starts.
_TELEMETRY = """
import socket, sys, time
from pathlib import Path
tried = []
real = socket.socket.connect
def connect(self, address):
    if self.family != socket.AF_UNIX:
        tried.append(address)
        raise ConnectionRefusedError
    return real(self, address)
socket.socket.connect = connect
socket.getaddrinfo = lambda *a, **k: tried.append(a) or (_ for _ in ()).throw(OSError())
import fastdraft_hf.recipe  # first, as on the command line
from fastdraft_hf.train.section import training_section
from fastdraft_hf.train.loop import train
from datasets import load_from_disk
from transformers import AutoTokenizer
start, data, work = map(Path, sys.argv[1:])
config = training_section()(max_train_tokens=32, max_length=8, per_device_train_batch_size=4,
    disable_tqdm=True)
train(start, work, config, train_dataset=load_from_disk(str(data / "train")),
    tokenizer=AutoTokenizer.from_pretrained(start), seed=0, device="cpu", label="x")
time.sleep(1)  # telemetry has a thread of its own
print("TRIED", tried)
"""


def test_no_telemetry(tmp_path: Path, tiny_target_folder: Path, data: Path) -> None:
    silenced = ("HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY", "DISABLE_TELEMETRY", "DO_NOT_TRACK")
    environment = {k: v for k, v in os.environ.items() if k not in silenced}
    # Whatever slips through the check goes nowhere.
    environment["HF_ENDPOINT"] = "http://127.0.0.1:9"
    result = subprocess.run(
        [sys.executable, "-c", _TELEMETRY, str(tiny_target_folder), str(data), str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip().splitlines()[-1] == "TRIED []"
