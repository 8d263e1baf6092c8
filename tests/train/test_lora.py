"""Low-rank adapters: re-alignment through the loop and from Python, killed, merged and used."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastdraft_hf._errors import FastDraftError
from fastdraft_hf.data.columns import distribution_table
from fastdraft_hf.data.target_logits import top_k_of
from fastdraft_hf.train.checkpoints import last_complete_checkpoint
from fastdraft_hf.train.loop import train
from fastdraft_hf.train.progress import TrainingProgress
from fastdraft_hf.train.section import LoraSettings, training_section
from fastdraft_hf.train.trainer import DraftDistillationConfig, DraftDistillationTrainer

Make = Callable[..., Any]
LENGTH, STEPS = 8, 7
V, K = 288, 6


class Killed(BaseException):
    pass


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, tiny_model: Make) -> Path:
    """Rows with the stored distribution of a target."""
    folder = tmp_path_factory.mktemp("data")
    target = tiny_model()
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 20), ("eval", 4)):
        rows, parts = [], []
        for _ in range(count):
            ids = torch.randint(3, 280, (LENGTH,), generator=generator)
            rows.append({"input_ids": ids.tolist(), "labels": [-100, *ids[1:].tolist()]})
            with torch.no_grad():
                kept = top_k_of(target(ids[None]).logits[0, :-1], K)
            found, log_probs, tail = (part.numpy() for part in kept)
            half = np.float16
            parts.append(
                (LENGTH, found.astype(np.uint16), log_probs.astype(half), tail.astype(half))
            )
        table = datasets.table.InMemoryTable(distribution_table(parts, 1.0))
        dataset = datasets.concatenate_datasets(
            [datasets.Dataset.from_list(rows), datasets.Dataset(table)], axis=1
        )
        dataset.save_to_disk(str(folder / split))
    return folder


@pytest.fixture(scope="module")
def start_model(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Make, tiny_tokenizer: Any
) -> Path:
    folder = tmp_path_factory.mktemp("start")
    tiny_model(seed=1, attention_dropout=0.2).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


def config(**changes: Any) -> Any:
    settings: dict[str, Any] = {
        "max_train_tokens": STEPS * 4 * LENGTH,
        "max_length": LENGTH,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "use_muon": False,
        "eval_rows": 4,
        "logging_steps": 1,
        "save_steps": 2,
        "objective": "kl",
        # Dropout draws random numbers, which a resumed run must draw alike.
        "lora": LoraSettings(r=4, lora_alpha=8, lora_dropout=0.1),
        "disable_tqdm": True,
        "head_dtype": "float32",
    }
    return training_section()(**{**settings, **changes})


def run(start: Path, tokenizer: Any, data: Path, work: Path, settings: Any, **more: Any) -> Any:
    splits = ("train", "eval")
    rows = {f"{name}_dataset": datasets.load_from_disk(str(data / name)) for name in splits}
    more = {"label": "align", **rows, **more}
    return train(start, work, settings, tokenizer=tokenizer, seed=3, device="cpu", **more)


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def losses(facts: dict[str, Any]) -> list[float]:
    return [entry["loss"] for entry in facts["log"] if "loss" in entry]


IDS = torch.tensor([[5, 17, 200, 31, 8, 90]])


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(IDS).logits
    return found


VARIANTS: dict[str, dict[str, Any]] = {
    "kl": {},
    "ce": {"objective": "ce"},
    "muon": {"use_muon": True, "muon_learning_rate": 2e-2},
    "some modules": {"lora": LoraSettings(r=2, lora_alpha=2, target_modules=["q_proj", "v_proj"])},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_killed_run_goes_on_bit_for_bit_and_is_merged(
    tmp_path: Path,
    start_model: Path,
    tiny_tokenizer: Any,
    data: Path,
    monkeypatch: pytest.MonkeyPatch,
    variant: str,
) -> None:
    settings = config(**VARIANTS[variant])
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    facts = run(start_model, tiny_tokenizer, data, whole, settings)
    assert facts["steps"] == STEPS

    def on_step_end(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 5:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(TrainingProgress, "on_step_end", on_step_end)
        with pytest.raises(Killed):
            run(start_model, tiny_tokenizer, data, killed, settings)
    checkpoint = last_complete_checkpoint(killed)
    assert checkpoint is not None
    assert checkpoint.name == "checkpoint-4"
    assert (checkpoint / "adapter_model.safetensors").exists()
    assert not (checkpoint / "model.safetensors").exists()  # adapters only
    resumed = run(start_model, tiny_tokenizer, data, killed, settings)
    assert losses(resumed) == losses(facts)
    for name in ("model/model.safetensors", "model/adapter/adapter_model.safetensors"):
        assert same(load_file(whole / name), load_file(killed / name)), name

    # Only the adapters changed, and they did.
    adapter = load_file(whole / "model" / "adapter" / "adapter_model.safetensors")
    assert adapter
    assert all(".lora_A." in name or ".lora_B." in name for name in adapter)
    assert any(value.abs().max() > 0 for name, value in adapter.items() if ".lora_B." in name)
    modules = settings.lora.target_modules if settings.lora else ""
    wanted = modules if isinstance(modules, list) else ["self_attn", "mlp"]
    assert all(any(part in name for part in wanted) for name in adapter)
    before = load_file(start_model / "model.safetensors")
    merged = load_file(whole / "model" / "model.safetensors")
    assert before.keys() == merged.keys()
    changed = {name for name in before if not torch.equal(before[name], merged[name])}
    touched = {
        name.removeprefix("base_model.model.").replace(".lora_A.weight", ".weight")
        for name in adapter
        if ".lora_A." in name
    }
    assert changed == touched

    # The base with its adapter is the merged model.
    base = AutoModelForCausalLM.from_pretrained(start_model)
    with_adapter = PeftModel.from_pretrained(base, str(whole / "model" / "adapter"))
    model = AutoModelForCausalLM.from_pretrained(whole / "model")
    torch.testing.assert_close(logits(model), logits(with_adapter), rtol=1e-4, atol=1e-4)
    original = AutoModelForCausalLM.from_pretrained(start_model)
    assert not torch.allclose(logits(model), logits(original), atol=1e-2)


def test_killed_after_the_last_checkpoint(
    tmp_path: Path, start_model: Path, tiny_tokenizer: Any, data: Path
) -> None:
    facts = run(start_model, tiny_tokenizer, data, tmp_path, config())
    last = last_complete_checkpoint(tmp_path)
    assert last is not None
    assert last.name == f"checkpoint-{STEPS}"  # so the state is taken, and nothing trained
    before = load_file(tmp_path / "model" / "model.safetensors")
    shutil.rmtree(tmp_path / "model")
    again = run(start_model, tiny_tokenizer, data, tmp_path, config())
    assert (again["steps"], again["tokens"]) == (facts["steps"], facts["tokens"])
    assert same(before, load_file(tmp_path / "model" / "model.safetensors"))


def test_it_learns_the_target_and_drafts_for_it(
    tmp_path: Path,
    start_model: Path,
    tiny_tokenizer: Any,
    data: Path,
    tiny_target_folder: Path,
) -> None:
    settings = config(max_train_tokens=60 * 4 * LENGTH, lora=LoraSettings(r=8, lora_alpha=16))
    facts = run(start_model, tiny_tokenizer, data, tmp_path, settings)
    found = losses(facts)
    assert sum(found[-5:]) < 0.9 * sum(found[:5])
    folder = tmp_path / "model"
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    assert (folder / "adapter" / "adapter_config.json").exists()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    target = AutoModelForCausalLM.from_pretrained(tiny_target_folder)
    draft = AutoModelForCausalLM.from_pretrained(folder)
    assert type(draft).__name__ == "LlamaForCausalLM"  # no wrapper, though adapter/ lies in it
    inputs = tokenizer("the cat", return_tensors="pt")
    given = {"do_sample": False, "max_new_tokens": 12}
    alone = target.generate(**inputs, **given)
    assert torch.equal(target.generate(**inputs, **given, assistant_model=draft), alone)


def test_an_online_target_and_minutes(
    tmp_path: Path, start_model: Path, tiny_tokenizer: Any, data: Path, tiny_target_folder: Path
) -> None:
    rows = datasets.load_from_disk(str(data / "train")).select_columns(["input_ids", "labels"])
    plain = {"train_dataset": rows, "eval_dataset": None, "teacher": tiny_target_folder}
    made = [
        run(
            start_model,
            tiny_tokenizer,
            data,
            tmp_path / name,
            config(objective={"ce": 0.5, "lk_hybrid": 0.5}, max_minutes=minutes),
            **plain,
        )
        for name, minutes in (("a", None), ("b", 1e6))
    ]
    # Timing a few steps first must leave no trace in the adapters.
    assert losses(made[0]) == losses(made[1])
    models = [tmp_path / name / "model" / "model.safetensors" for name in ("a", "b")]
    assert same(*map(load_file, models))


def test_modules_that_there_are_not(
    tmp_path: Path, start_model: Path, tiny_tokenizer: Any, data: Path
) -> None:
    settings = config(lora=LoraSettings(target_modules=["q_porj"]))
    with pytest.raises(FastDraftError, match=r"^align: .*q_porj"):
        run(start_model, tiny_tokenizer, data, tmp_path, settings)
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 0}, "r: must be at least 1, got 0"),
        ({"lora_dropout": 1.0}, "lora_dropout: must be at least 0 and bel"),
        ({"target_modules": ["q_proj", "lm_head"]}, "target_modules: lm_head is the head"),
    ],
)
def test_settings_refuse_nonsense(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(FastDraftError, match=message):
        LoraSettings(**settings)


@pytest.mark.parametrize("objective", ["kl", "ce"])
def test_from_python(
    tmp_path: Path, start_model: Path, tiny_tokenizer: Any, data: Path, objective: str
) -> None:
    trainer = DraftDistillationTrainer(
        model=str(start_model),
        args=DraftDistillationConfig(
            output_dir=str(tmp_path / "out"),
            objective=objective,
            max_train_tokens=str(STEPS * 4 * LENGTH),
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            head_dtype="float32",
            bf16=False,
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=datasets.load_from_disk(str(data / "train")),
        processing_class=tiny_tokenizer,
        peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    before = {name: p.clone() for name, p in trainer.model.named_parameters()}
    trained = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)
    trainer.train()
    assert trainer.state.num_input_tokens_seen == STEPS * 4 * LENGTH
    changed = {n for n, p in trainer.model.named_parameters() if not torch.equal(before[n], p)}
    assert changed == trained
    trainer.save_model(str(tmp_path / "saved"))
    assert (tmp_path / "saved" / "adapter_config.json").exists()
    base = AutoModelForCausalLM.from_pretrained(start_model)
    loaded = PeftModel.from_pretrained(base, str(tmp_path / "saved"))
    torch.testing.assert_close(logits(loaded), logits(trainer.model), rtol=1e-4, atol=1e-4)
    expected = logits(loaded)
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(
        expected, logits(AutoModelForCausalLM.from_pretrained(start_model)), atol=1e-2
    )


def test_an_adapter_changes_the_loss_that_is_trained(
    tmp_path: Path, start_model: Path, tiny_tokenizer: Any, data: Path
) -> None:
    """Loss and gradients go through the adapters: the wrapped model equals the merged one."""
    trainer = DraftDistillationTrainer(
        model=AutoModelForCausalLM.from_pretrained(start_model, attention_dropout=0.0),
        args=DraftDistillationConfig(
            output_dir=str(tmp_path / "out"),
            objective="ce_kl",
            max_steps=1,
            per_device_train_batch_size=4,
            head_dtype="float32",
            bf16=False,
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=datasets.load_from_disk(str(data / "train")),
        processing_class=tiny_tokenizer,
        peft_config=LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False),
    )
    batch = next(iter(trainer.get_train_dataloader()))
    wrapped = trainer.compute_loss(trainer.model, dict(batch))
    wrapped.backward()
    gradients = [p.grad for p in trainer.model.parameters() if p.requires_grad]
    assert all(g is not None and torch.isfinite(g).all() and g.abs().max() > 0 for g in gradients)
    assert all(p.grad is None for p in trainer.model.parameters() if not p.requires_grad)
    merged = trainer.model.merge_and_unload()
    with torch.no_grad():
        alone = trainer.compute_loss(merged, dict(batch))
        plain = AutoModelForCausalLM.from_pretrained(start_model, attention_dropout=0.0)
        without = trainer.compute_loss(plain, dict(batch))
    torch.testing.assert_close(wrapped.detach(), alone, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(alone, without, rtol=1e-3)
