"""Reduced heads: which ids, the file beside a checkpoint, our loop, and OpenVINO."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import KEPT
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from fastdraft_hf import FastDraftError, assisted_decoding
from fastdraft_hf.decode.assisted import record_rounds
from fastdraft_hf.decode.settings import set_draft_length
from fastdraft_hf.draft.reduced_vocabulary import (
    FILE,
    check_size,
    load_draft,
    rank_tokens,
    read_reduced_vocabulary,
    reduce_model,
)
from fastdraft_hf.export.openvino import LOWEST, export_openvino
from fastdraft_hf.export.parity import compare_export

TinyModel = Callable[..., LlamaForCausalLM]
EXACT = {"KV_CACHE_PRECISION": "f32", "INFERENCE_PRECISION_HINT": "f32"}


@given(
    st.dictionaries(st.integers(0, 59), st.integers(1, 9)),
    st.sets(st.integers(0, 59), max_size=5),
    st.integers(6, 59),
)
def test_the_most_frequent_ids_are_kept(
    counts: dict[int, int], always: set[int], size: int
) -> None:
    order = rank_tokens(counts, always, 60)
    assert sorted(order) == list(range(60))
    assert set(order[: len(always)]) == always
    free, left = order[len(always) : size], order[size:]
    if free and left:
        assert min(counts.get(t, 0) for t in free) >= max(counts.get(t, 0) for t in left)
    check_size(size, always, 60)
    for impossible in (len(always), 60, 61):
        with pytest.raises(FastDraftError, match="draft_vocab_size"):
            check_size(impossible, always, 60)


IDS = ('"ab"', "[]", "[2, 1]", "[1.5]", "[1, 1]", "[-1, 2]")
DAMAGED = ["", "[]", "{}", *(f'{{"token_ids": {ids}}}' for ids in IDS)]


@pytest.mark.parametrize("text", DAMAGED)
def test_a_damaged_file_names_itself(tmp_path: Path, text: str) -> None:
    (tmp_path / FILE).write_text(text)
    with pytest.raises(FastDraftError, match=FILE):
        read_reduced_vocabulary(tmp_path)


def test_stock_transformers_reads_the_full_head(
    reduced_draft_folder: Path, tiny_model: TinyModel
) -> None:
    ids = torch.tensor([[40, 41, 42]])
    with torch.no_grad():
        expected = tiny_model()(ids).logits
        stock = AutoModelForCausalLM.from_pretrained(reduced_draft_folder)(ids).logits
        ours = load_draft(reduced_draft_folder)(ids).logits
    torch.testing.assert_close(stock, expected)
    torch.testing.assert_close(ours, expected[..., list(KEPT)])


@pytest.mark.parametrize("kind", ["tied", "untied", "bias"])
def test_the_head_is_reduced_and_the_embeddings_are_not(tiny_model: TinyModel, kind: str) -> None:
    model, ids = tiny_model(tie_word_embeddings=kind == "tied"), torch.tensor([[40, 41]])
    if kind == "bias":
        model.lm_head = torch.nn.Linear(32, 288, bias=True)
    before = model.get_input_embeddings().weight.clone()
    with torch.no_grad():
        expected = model(ids).logits[..., list(KEPT)]
        reduce_model(model, KEPT)
        torch.testing.assert_close(model(ids).logits, expected)
    assert torch.equal(model.get_input_embeddings().weight, before)
    with pytest.raises(FastDraftError, match="copy that"):
        model.save_pretrained("nowhere")
    assert not Path("nowhere").exists()
    with pytest.raises(FastDraftError, match="another vocabulary"):
        reduce_model(tiny_model(), (1, 288))


def write(target: Any, draft: Any, first: int, **given: Any) -> Any:
    ids = torch.tensor([[first, 41]])
    fields: dict[str, Any] = {"do_sample": False, "max_new_tokens": 16, **given}
    fields["attention_mask"] = torch.ones_like(ids)
    if draft is not None:
        set_draft_length(draft.generation_config, 3)
        fields |= {"assistant_model": draft, "custom_generate": assisted_decoding}
    return target.generate(ids, **fields)


def test_our_loop_writes_the_targets_text(
    reduced_draft_folder: Path, tiny_model: TinyModel
) -> None:
    """And accepts every token that is in the head: the draft is the target."""
    target, draft = tiny_model(), load_draft(reduced_draft_folder)
    for first in range(40, 56):
        alone = write(target, None, first)
        with record_rounds(target) as rounds:
            assert torch.equal(write(target, draft, first), alone)
        accepted = sum(a for _, a in rounds)
        assert accepted <= sum(int(t) in KEPT for t in alone[0, 2:])
        if all(int(t) in KEPT for t in alone[0, 2:-1]):
            assert accepted >= len(rounds) - 1
    # Stock decoding would read its columns as ids, so the target decodes alone.
    given = {"return_dict_in_generate": True, "output_hidden_states": True}
    with pytest.warns(UserWarning, match="decodes with the target alone"):
        output = write(target, draft, 40, **given)
    assert torch.equal(output.sequences, write(target, None, 40))


def test_an_export_that_fails_says_which_and_the_others_stay(
    openvino_models: Any, tiny_target_folder: Path
) -> None:
    """The first of it is what `openvino_models` saw when it was made."""
    models = openvino_models
    assert models.error.startswith(f"OpenVINO export of {models.broken} failed:\n")
    file = models.target / "openvino_model.xml"
    before = file.stat().st_mtime_ns
    export_openvino((tiny_target_folder, models.target, "fp32"))
    assert file.stat().st_mtime_ns == before  # a finished one is not made again


def logits(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    from optimum.intel import OVModelForCausalLM

    model = OVModelForCausalLM.from_pretrained(folder, ov_config=EXACT)
    return torch.as_tensor(model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits)


def test_openvinos_logits_are_pytorchs_at_full_width(
    openvino_models: Any, reduced_draft_folder: Path
) -> None:
    ids = torch.tensor([[40, 41, 42, 43, 250], [60, 61, 62, 63, 7]])
    with torch.no_grad():
        expected = load_draft(reduced_draft_folder)(ids).logits
    found = logits(openvino_models.reduced, ids)
    assert found.shape == (2, 5, 288)
    torch.testing.assert_close(found[..., list(KEPT)], expected, atol=2e-3, rtol=2e-3)
    assert torch.equal(found.argmax(-1), torch.tensor(KEPT)[expected.argmax(-1)])
    assert (found[..., [t for t in range(288) if t not in KEPT]] == LOWEST).all()
    # The parity check compares with the reduced head: the full one has other tokens.
    assert compare_export(reduced_draft_folder, openvino_models.reduced).exact
    assert not compare_export(reduced_draft_folder, openvino_models.target).exact
    # Rows of an int8 head are the full head's.
    full = logits(openvino_models.target_int8, ids)[..., list(KEPT)]
    torch.testing.assert_close(logits(openvino_models.reduced_int8, ids)[..., list(KEPT)], full)


def test_genai_and_our_loop_take_it_as_a_draft(openvino_models: Any, tiny_model: TinyModel) -> None:
    from optimum.intel import OVModelForCausalLM

    from fastdraft_hf.decode.openvino.pipeline import OpenVINODecoder

    whole, reduced = openvino_models.target, openvino_models.reduced
    alone = OpenVINODecoder(whole, properties=EXACT)
    drafted = OpenVINODecoder(whole, reduced, properties=EXACT)
    target = tiny_model()
    ours = OVModelForCausalLM.from_pretrained(reduced, ov_config=EXACT)
    accepted = [0, 0]
    for first in range(40, 50):
        given: dict[str, Any] = {"max_new_tokens": 16, "stop_ids": {2}}
        expected = alone.decode([first, 41], **given)
        record = drafted.decode([first, 41], num_assistant_tokens=3, **given)
        assert record.tokens == expected.tokens
        accepted[0] += record.accepted
        with record_rounds(target) as rounds:
            assert torch.equal(write(target, ours, first), write(target, None, first))
        accepted[1] += sum(a for _, a in rounds)
    assert min(accepted) > 0
