"""Low-rank adapters: re-alignment through the loop and from Python, killed, merged and used."""

from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from tiny_training import LENGTH, Killed, Make, kill_at, losses, run, same, section, with_columns
from transformers import AutoModelForCausalLM

from fastdraft_hf.train.callbacks import newest_complete
from fastdraft_hf.train.section import LoraSettings

STEPS = 7


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, tiny_model: Make) -> Path:
    """Rows with the stored distribution of a target."""
    folder = tmp_path_factory.mktemp("data")
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 20), ("eval", 4)):
        ids = torch.randint(3, 280, (count, LENGTH), generator=generator).tolist()
        rows = [{"input_ids": row, "labels": [-100, *row[1:]]} for row in ids]
        with_columns(rows, tiny_model()).save_to_disk(str(folder / split))
    return folder


def config(**changes: Any) -> Any:
    settings: dict[str, Any] = {
        "max_train_tokens": STEPS * 4 * LENGTH,
        "learning_rate": 1e-2,
        "use_muon": False,
        "objective": "kl",
        # Dropout draws random numbers, which a resumed run must draw alike.
        "lora": LoraSettings(r=4, lora_alpha=8, lora_dropout=0.1),
    }
    return section(**{**settings, **changes})


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
def test_a_killed_run_resumes_bit_for_bit_and_is_merged(
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

    with monkeypatch.context() as patch:
        kill_at(patch, 5)
        with pytest.raises(Killed):
            run(start_model, tiny_tokenizer, data, killed, settings)
    checkpoint = newest_complete(killed)
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


def test_an_adapter_changes_the_loss_that_is_trained(
    trainer: Make, start_model: Path, data: Path
) -> None:
    """Loss and gradients go through the adapters: the wrapped model equals the merged one."""
    lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    made = trainer(
        datasets.load_from_disk(str(data / "train")),
        AutoModelForCausalLM.from_pretrained(start_model, attention_dropout=0.0),
        objective="ce_kl",
        given={"peft_config": lora},
    )
    batch = next(iter(made.get_train_dataloader()))
    wrapped = made.compute_loss(made.model, dict(batch))
    wrapped.backward()
    gradients = [p.grad for p in made.model.parameters() if p.requires_grad]
    assert all(g is not None and torch.isfinite(g).all() and g.abs().max() > 0 for g in gradients)
    assert all(p.grad is None for p in made.model.parameters() if not p.requires_grad)
    merged = made.model.merge_and_unload()
    with torch.no_grad():
        alone = made.compute_loss(merged, dict(batch))
        plain = AutoModelForCausalLM.from_pretrained(start_model, attention_dropout=0.0)
        without = made.compute_loss(plain, dict(batch))
    torch.testing.assert_close(wrapped.detach(), alone, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(alone, without, rtol=1e-3)
