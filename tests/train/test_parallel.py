"""Parallel drafting: what the masks read and predict, and a draft that learns it."""

from typing import Any

import pytest
import torch
from datasets import Dataset
from tiny_training import Make

from fastdraft_hf import FastDraftError, assisted_decoding
from fastdraft_hf.decode.assisted import record_rounds
from fastdraft_hf.decode.settings import set_draft_length
from fastdraft_hf.train import parallel
from fastdraft_hf.train.parallel import mask_token_of, with_masks

MASK = 287
ROWS = [list(range(10, 17)), [30, 31, 32, 33], [50]]


def batch(labelled_from: int = 0) -> dict[str, torch.Tensor]:
    longest = max(map(len, ROWS))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in ROWS])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in ROWS])
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :labelled_from] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def one_by_one(labelled_from: int = 0, tokens: int = 3) -> list[tuple[list[int], int, int, int]]:
    """Return (ids, row, place of what is predicted, id) of every mask, written out."""
    found = []
    for number, row in enumerate(ROWS):
        for last in range(max(0, labelled_from - 1), len(row)):
            for step in range(1, tokens):
                if last + step + 1 < len(row):
                    place = last + step + 1
                    found.append((row[: last + 1] + [MASK] * step, number, place, row[place]))
    return found


def test_a_mask_sees_the_text_so_far_and_the_masks_before_it(
    tiny_model: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parallel, "KEPT", 1.0)
    model, given = tiny_model(), batch(labelled_from=2)
    masked = with_masks(
        **given, mask_token=MASK, num_tokens=3, generator=torch.Generator().manual_seed(0)
    )
    with torch.no_grad():
        logits = model(**masked.inputs).logits
        plain = model(input_ids=given["input_ids"], attention_mask=given["attention_mask"]).logits
    length = given["input_ids"].shape[1]
    real = given["attention_mask"].bool()
    assert torch.allclose(logits[:, :length][real], plain[real], atol=1e-4)
    expected = one_by_one(labelled_from=2)
    assert len(expected) == len(masked.rows)
    for number, (ids, row, place, label) in enumerate(expected):
        assert (int(masked.rows[number]), int(masked.columns[number])) == (row, place)
        assert int(given["labels"][row, place]) == label
        with torch.no_grad():
            alone = model(input_ids=torch.tensor([ids])).logits[0, -1]
        assert torch.allclose(logits[row, masked.masks[number]], alone, atol=1e-4)


def test_most_masks_are_dropped_and_none_without_those_behind_it() -> None:
    ids = torch.arange(400).reshape(2, 200)
    masked = with_masks(
        ids, None, ids, mask_token=MASK, num_tokens=4, generator=torch.Generator().manual_seed(0)
    )
    at = list(zip(masked.rows.tolist(), masked.columns.tolist(), strict=True))
    depths = masked.inputs["attention_mask"][:, 0, :, 200:].sum(-1)[masked.rows, masked.masks]
    counts = depths.bincount().tolist()
    assert len(at) == sum(counts)
    for depth in (1, 2, 3):
        assert counts[depth] == pytest.approx(400 * 0.7**depth, rel=0.15)


@pytest.mark.parametrize("objective", ["ce", {"ce": 0.5, "kl": 0.5}])
def test_loss_and_gradients_are_those_of_every_block_by_itself(
    trainer: Make, tiny_model: Make, monkeypatch: pytest.MonkeyPatch, objective: Any
) -> None:
    monkeypatch.setattr(parallel, "KEPT", 1.0)
    teacher = tiny_model(seed=5)
    made = trainer(
        Dataset.from_dict({"input_ids": ROWS, "labels": ROWS}),
        tiny_model(pard_token=MASK),
        teacher_model=teacher,
        num_parallel_tokens=3,
        objective=objective,
    )
    made.model.train()
    loss = made.compute_loss(made.model, batch())
    loss.backward()
    fused = {name: p.grad.clone() for name, p in made.model.named_parameters()}
    made.model.zero_grad()
    cases = one_by_one()
    for number, row in enumerate(ROWS):
        cases += [(row[:end], number, end, row[end]) for end in range(1, len(row))]
    total = torch.zeros(())
    for ids, row, place, label in cases:
        log_q = made.model(input_ids=torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        ce = -log_q[label]
        with torch.no_grad():
            text = torch.tensor([ROWS[row][:place]])
            log_p = teacher(input_ids=text).logits[0, -1].log_softmax(-1)
        kl = (log_p.exp() * (log_p - log_q)).sum()
        total = total + (ce if objective == "ce" else 0.5 * ce + 0.5 * kl)
    reference = total / len(cases)
    assert float(loss) == pytest.approx(float(reference), rel=1e-5)
    reference.backward()
    for name, parameter in made.model.named_parameters():
        scale = float(parameter.grad.abs().max())
        assert torch.allclose(fused[name], parameter.grad, atol=1e-4 * scale), name


def test_a_draft_learns_to_guess_several_tokens_in_one_pass(
    trainer: Make, tiny_model: Make
) -> None:
    """Texts that count: the third token ahead is as certain as the next."""
    rows = [[10 + (start + n) % 20 for n in range(30)] for start in range(20)]
    data = Dataset.from_dict({"input_ids": rows, "labels": rows})
    made = trainer(
        data,
        tiny_model(seed=1, pard_token=MASK),
        num_parallel_tokens=4,
        max_steps=150,
        learning_rate=3e-3,
        max_length=32,
    )
    made.train()
    plain = trainer(data, tiny_model(seed=2), max_steps=150, learning_rate=3e-3, max_length=32)
    plain.train()
    target, draft = plain.model.eval(), made.model.eval()
    prompt = torch.tensor([[12, 13, 14, 15]])
    set_draft_length(draft.generation_config, 4)
    given = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 25, "do_sample": False}
    with record_rounds(target) as at_once:
        text = target.generate(
            prompt, assistant_model=draft, custom_generate=assisted_decoding, **given
        )
    assert text[0].tolist() == [10 + (2 + n) % 20 for n in range(29)]
    assert at_once == [(4, 4)] * 5
    draft.config.pard_token = None  # the same checkpoint, one by one
    with record_rounds(target) as singly:
        target.generate(prompt, assistant_model=draft, custom_generate=assisted_decoding, **given)
    assert singly == at_once


def test_what_it_cannot_be_combined_with(trainer: Make, tiny_model: Make) -> None:
    data = Dataset.from_dict({"input_ids": ROWS, "labels": ROWS})
    with pytest.raises(FastDraftError, match="num_parallel_tokens: must be at least 1, got 0"):
        trainer(data, num_parallel_tokens=0)
    with pytest.raises(FastDraftError, match="num_parallel_tokens: packed rows"):
        trainer(data, num_parallel_tokens=2, packing=True, max_length=16)
    draft = tiny_model()
    draft.set_attn_implementation("eager")
    with pytest.raises(FastDraftError, match="attn_implementation='sdpa' instead of 'eager'"):
        trainer(data, draft, num_parallel_tokens=2)


def test_the_mask_is_a_token_that_no_text_holds(target_tokenizer: Any) -> None:
    rows = len(target_tokenizer)
    token = target_tokenizer.decode([mask_token_of(target_tokenizer, rows)])
    assert token in target_tokenizer.all_special_tokens + list(target_tokenizer.get_added_vocab())
    assert token not in str(target_tokenizer.chat_template)
    assert mask_token_of(target_tokenizer, rows + 5) == len(target_tokenizer)
