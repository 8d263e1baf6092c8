from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from tiny_training import Make
from trl import SFTConfig

from fastdraft_hf._errors import FastDraftError
from fastdraft_hf.train.optimizer import MuonWithAdamW
from fastdraft_hf.train.trainer import (
    DraftDistillationConfig,
    DraftDistillationTrainer,
    has_fast_bf16,
)


def examples(count: int = 8, seed: int = 0) -> datasets.Dataset:
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for number in range(count):
        ids = torch.randint(3, 280, (6 + number % 5,), generator=generator).tolist()
        rows.append({"input_ids": ids, "labels": [-100, -100, *ids[2:]]})
    return datasets.Dataset.from_list(rows)


@pytest.fixture
def trainer(trainer: Make) -> Make:
    def make(model: Any = None, **settings: Any) -> DraftDistillationTrainer:
        skip = {"dataset_kwargs": {"skip_prepare_dataset": True}}
        made: DraftDistillationTrainer = trainer(examples(), model, **{**skip, **settings})
        return made

    return make


def batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 280, (3, 9), generator=generator)
    mask = torch.ones_like(ids)
    labels = ids.clone()
    labels[0, :4] = -100  # a prompt
    labels[2, 3] = -100  # a hole
    for row, length in ((1, 6), (2, 8)):  # padding
        ids[row, length:], mask[row, length:], labels[row, length:] = 0, 0, -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("items", [None, 40, torch.tensor(40)])
def test_loss_and_gradients_are_the_dense_ones(
    trainer: Make, tiny_model: Make, tied: bool, items: Any
) -> None:
    model = tiny_model(tie_word_embeddings=tied).train()
    draft_trainer = trainer(model)
    inputs = batch()
    loss = draft_trainer.compute_loss(model, dict(inputs), num_items_in_batch=items)
    loss.backward()
    ours = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    dense = model(**inputs).loss
    count = int((inputs["labels"][:, 1:] != -100).sum())
    if items is not None:
        dense = dense * count / 40
    dense.backward()
    torch.testing.assert_close(loss, dense, rtol=1e-5, atol=1e-6)
    for name, parameter in model.named_parameters():
        scale = float(parameter.grad.abs().max())
        torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-4, atol=1e-5 * scale)


def test_a_batch_without_labels_has_no_loss(trainer: Make, tiny_model: Make) -> None:
    model = tiny_model().train()
    inputs = batch()
    inputs["labels"][:] = -100
    loss = trainer(model).compute_loss(model, inputs)
    loss.backward()
    assert float(loss) == 0


def test_outputs_have_logits(trainer: Make, tiny_model: Make) -> None:
    model = tiny_model().train()
    inputs = batch()
    draft_trainer = trainer(model)
    loss, outputs = draft_trainer.compute_loss(model, dict(inputs), return_outputs=True)
    assert outputs.logits.shape == (3, 9, 288)
    torch.testing.assert_close(loss, draft_trainer.compute_loss(model, dict(inputs)))


def rates(trainer: DraftDistillationTrainer) -> dict[str, float]:
    optimizer = trainer.create_optimizer()
    names = {id(p): name for name, p in trainer.model.named_parameters()}
    found = [(names[id(p)], g["lr"]) for g in optimizer.param_groups for p in g["params"]]
    assert sorted(name for name, _ in found) == sorted(names.values())  # each of them once
    return dict(found)


@pytest.mark.parametrize("muon", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_learning_rates(trainer: Make, tiny_model: Make, muon: bool, tied: bool) -> None:
    made = trainer(
        tiny_model(tie_word_embeddings=tied),
        use_muon=muon,
        learning_rate=0.01,
        muon_learning_rate=0.05,
        weight_decay=0.1,
    )
    found = rates(made)
    tables = {"model.embed_tokens.weight", "lm_head.weight"}
    for name, rate in found.items():
        matrix = name not in tables and "norm" not in name
        assert rate == (0.05 if matrix and muon else 0.01)
    optimizer = made.create_optimizer()
    assert made.create_optimizer() is optimizer
    assert isinstance(optimizer, MuonWithAdamW) == muon
    if muon:
        assert all(p.ndim == 2 for g in optimizer.parts["muon"].param_groups for p in g["params"])


def test_wrong_arguments(trainer: Make, tiny_model: Make, tiny_tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="must be a DraftDistillationConfig, got SFTConfig"):
        DraftDistillationTrainer(
            model=tiny_model(),
            args=SFTConfig(output_dir="x", use_cpu=True, bf16=False, report_to="none"),
            train_dataset=examples(),
            processing_class=tiny_tokenizer,
        )
    with pytest.raises(ValueError, match="label_smoothing_factor 0"):
        trainer(label_smoothing_factor=0.1)
    with pytest.raises(ValueError, match="loss_type must be 'nll'"):
        trainer(loss_type="dft")
    with pytest.raises(ValueError, match="head_dtype: must be auto"):
        trainer(head_dtype="float16")
    with pytest.raises(FastDraftError, match="push_to_hub: run `fastdraft push`"):
        trainer(push_to_hub=True)
    with pytest.raises(FastDraftError, match=r"push_to_hub: .* run `fastdraft push`"):
        trainer().push_to_hub()


def test_two_visible_gpus_and_one_process(trainer: Make, caplog: pytest.LogCaptureFixture) -> None:
    """`Trainer` would wrap the draft in `DataParallel`, under which the hook sees nothing."""
    made = trainer()
    args = made.args
    args._n_gpu = 2  # what a plain `python` finds on a machine with two
    again = DraftDistillationTrainer(
        made.model, args, train_dataset=examples(), processing_class=made.processing_class
    )
    assert "`accelerate launch`" in caplog.text
    assert (again.args.n_gpu, again.args.train_batch_size) == (1, 4)
    again.train()
    assert again.state.global_step == 3
    assert args.n_gpu == 2  # the caller's config is not changed


def test_only_a_folder_and_rows(
    tiny_target_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    made = DraftDistillationTrainer(str(tiny_target_folder), train_dataset=examples())
    assert made.args.output_dir == f"{tiny_target_folder.name}-FastDraft"
    assert made.processing_class.get_vocab()
    assert (made.args.use_muon, made.args.sampled_softmax) == (True, 8192)
    assert repr(made.objective) == "1 ce"
    args = DraftDistillationConfig("out", max_train_tokens="100", use_cpu=True)
    before = dict(vars(args))
    DraftDistillationTrainer(str(tiny_target_folder), args, train_dataset=examples())
    assert vars(args) == before


def test_bf16_is_asked_of_the_device() -> None:
    # torch has these queries under private names; they may move.
    supported = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    assert has_fast_bf16("cpu") is bool(supported)
    assert has_fast_bf16("meta") is False


def test_sampled_softmax_is_for_training_alone(trainer: Make) -> None:
    sampling, whole = trainer(sampled_softmax=5), trainer()
    sampling.model.load_state_dict(whole.model.state_dict())

    def losses(training: bool) -> tuple[float, float]:
        return tuple(  # type: ignore[return-value]
            float(t.compute_loss(t.model.train(training), batch()).detach())
            for t in (sampling, whole)
        )

    sampled, dense = losses(training=True)
    assert sampled != pytest.approx(dense, rel=1e-6)
    assert sampled == pytest.approx(dense, rel=0.1)  # an estimate of it
    assert losses(training=False)[0] == losses(training=False)[1]


def test_capped_logits_are_scored_whole(trainer: Make, tiny_model: Make) -> None:
    capped = tiny_model()
    capped.config.final_logit_softcapping = 30.0  # as Gemma 2 has it
    losses = []
    for settings in ({"sampled_softmax": 5}, {}):
        made = trainer(capped, **settings)
        losses.append(float(made.compute_loss(made.model.train(), batch()).detach()))
    assert losses[0] == losses[1]


def test_special_tokens_stay_the_targets(trainer: Make, tiny_model: Make) -> None:
    """The tokenizer has others; OpenVINO GenAI compares the target's with the draft's."""
    model = tiny_model()
    for config in (model.config, model.generation_config):
        config.bos_token_id, config.eos_token_id = 7, 8
    trainer(model, max_steps=1).train()
    for config in (model.config, model.generation_config):
        assert (config.bos_token_id, config.eos_token_id) == (7, 8)


@pytest.mark.parametrize("settings", [{"use_muon": True}, {"head_dtype": "bfloat16"}])
def test_it_learns(trainer: Make, settings: dict[str, str]) -> None:
    made = trainer(
        max_steps=40, learning_rate=0.01, logging_steps=1, lr_scheduler_type="constant", **settings
    )
    made.train()
    losses = [entry["loss"] for entry in made.state.log_history if "loss" in entry]
    assert len(losses) == 40
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
