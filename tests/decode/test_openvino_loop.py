"""Our loop with ``OVModelForCausalLM`` as target, as draft and as both; and GenAI's pipeline."""

import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from decoding_helpers import assert_equal_or_tied, load_openvino, padded, write
from test_sampling_is_exact import exact, p_value, sample
from transformers import LlamaForCausalLM

from fastdraft_hf import FastDraftError, openvino_pipeline
from fastdraft_hf.decode.assisted import record_decoding, record_rounds
from fastdraft_hf.decode.loop import Loop
from fastdraft_hf.decode.settings import store_draft_settings
from fastdraft_hf.export.parity import EXACT

pytest.importorskip("openvino_genai")
pytest.importorskip("optimum.intel")


@pytest.fixture(scope="module")
def models(
    openvino_models: Any, target: LlamaForCausalLM, neighbour: LlamaForCausalLM
) -> dict[str, Any]:
    # Two orders of the same computation are compared, so nothing may be rounded on the way.
    properties = {**EXACT, "INFERENCE_NUM_THREADS": "1"}
    return {
        "ov-target": load_openvino(openvino_models.target, **properties),
        "ov-draft": load_openvino(openvino_models.draft, **properties),
        "pt-target": target,
        "pt-draft": neighbour,
    }


PAIRS = [("ov", "ov"), ("ov", "pt"), ("pt", "ov")]


@pytest.mark.parametrize(("kind", "draft_kind"), PAIRS)
def test_greedy_output_is_the_targets(models: dict[str, Any], kind: str, draft_kind: str) -> None:
    target, draft = models[f"{kind}-target"], models[f"{draft_kind}-draft"]
    rng = random.Random(1)
    counts = [0, 0]
    for number in range(200):
        prompt = [rng.randrange(3, 288) for _ in range(rng.randrange(1, 10))]
        alone = write(target, [prompt], max_new_tokens=8)
        with record_rounds(target) as rounds:
            ours = write(target, [prompt], draft, number % 8 + 1, max_new_tokens=8)
        assert_equal_or_tied(models["pt-target"], alone, ours)
        counts[0] += sum(d for d, _ in rounds)
        counts[1] += sum(a for _, a in rounds)
    assert 0.05 < counts[1] / counts[0] < 0.95


def assert_rows_are_the_targets(
    reference: Any, prompts: list[list[int]], target: Any, draft: Any, gamma: int, new: int
) -> None:
    """Decode the prompts in a batch, and each of them alone with the reference."""
    ids, mask = padded(prompts)
    given = {"attention_mask": mask, "max_new_tokens": new}
    ours = write(target, ids, draft, gamma, copies=gamma % 2, **given)
    for row, prompt in enumerate(prompts):
        alone = write(reference, [prompt], max_new_tokens=new)
        written = ours[row : row + 1, ids.shape[1] - len(prompt) :]
        assert_equal_or_tied(reference, alone, written)


@pytest.mark.parametrize(("kind", "draft_kind"), PAIRS)
def test_batches(models: dict[str, Any], kind: str, draft_kind: str) -> None:
    target, draft = models[f"{kind}-target"], models[f"{draft_kind}-draft"]
    rng = random.Random(2)
    for gamma in (1, 3, 6):
        for rows in (1, 2, 4):
            prompts = [
                [rng.randrange(3, 288) for _ in range(rng.randrange(1, 9))] for _ in range(rows)
            ]
            assert_rows_are_the_targets(models["pt-target"], prompts, target, draft, gamma, 20)


@pytest.mark.parametrize(("kind", "draft_kind"), PAIRS)
def test_a_draft_that_drafts_a_block_in_one_pass(
    models: dict[str, Any], monkeypatch: pytest.MonkeyPatch, kind: str, draft_kind: str
) -> None:
    target, draft = models[f"{kind}-target"], models[f"{draft_kind}-draft"]
    monkeypatch.setattr(draft.config, "pard_token", 287, raising=False)
    rng = random.Random(3)
    for gamma in (1, 3, 5):
        prompts = [[rng.randrange(3, 288) for _ in range(rng.randrange(1, 9))] for _ in range(3)]
        assert_rows_are_the_targets(models["pt-target"], prompts, target, draft, gamma, 16)


def test_one_model_cannot_draft_for_itself(models: dict[str, Any]) -> None:
    target = models["ov-target"]
    with pytest.warns(UserWarning, match="cannot draft for itself"):
        ours = write(target, [[40, 41]], target)
    assert torch.equal(ours, write(target, [[40, 41]]))


def test_torch_leaves_the_cores_to_openvino(
    models: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only where PyTorch computes nothing itself, and as before when the call is over."""
    seen: list[int] = []
    whole = Loop.run
    monkeypatch.setattr(
        Loop, "run", lambda loop: (seen.append(torch.get_num_threads()), whole(loop))
    )
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for kind, draft_kind in PAIRS:
            write(models[f"{kind}-target"], [[40]], models[f"{draft_kind}-draft"], 2)
        after = torch.get_num_threads()
    finally:
        torch.set_num_threads(before)
    assert seen == [1, 2, 2]
    assert after == 2


def test_samples_are_exact(models: dict[str, Any]) -> None:
    """So hot that each of four tokens is likely; the draft is accepted in half of the places."""
    sampling = {"top_k": 4, "temperature": 20.0}
    target, draft = models["ov-target"], models["ov-draft"]
    cells = exact(target, sampling)
    assert len(cells) == 4**3
    assert max(cells.values()) < 0.05
    # PyTorch's target has the same, so a wrong cache does not agree with itself here.
    for cell, chance in exact(models["pt-target"], sampling).items():
        assert cells[cell] == pytest.approx(chance, rel=1e-3)
    with record_rounds(target) as rounds:
        found = sample(target, draft, sampling, rows=500, gamma=3)
    assert 0.2 < sum(a for _, a in rounds) / sum(d for d, _ in rounds) < 0.8
    assert p_value(found, cells) > 1e-3


def test_the_pipeline_drafts_as_measured(openvino_models: Any, tmp_path: Path) -> None:
    draft = shutil.copytree(openvino_models.draft, tmp_path / "draft")
    store_draft_settings(draft, 2)
    pipeline = openvino_pipeline(openvino_models.target, draft, "CPU")
    assert pipeline.get_generation_config().num_assistant_tokens == 2
    result = pipeline.generate(["the cat"], max_new_tokens=12, apply_chat_template=False)
    metrics = result.extended_perf_metrics
    assert 0 < metrics.get_num_draft_tokens() <= 2 * 12
    with pytest.raises(FastDraftError, match=r"has no openvino_model\.xml"):
        openvino_pipeline(openvino_models.target, tmp_path)


@pytest.mark.parametrize(("kind", "draft_kind"), PAIRS)
def test_the_recorder_reads_a_batch(models: dict[str, Any], kind: str, draft_kind: str) -> None:
    target, draft = models[f"{kind}-target"], models[f"{draft_kind}-draft"]
    ids = [[40, 41, 42], [70, 33, 250]]
    with record_decoding(target) as records:
        output = write(target, ids, draft)
    assert [r.path for r in records] == ["ours-openvino"] * 2
    for row, record in enumerate(records):
        assert record.tokens == output[row, 3 : 3 + record.new_tokens].tolist()
        assert record.new_tokens == record.accepted + record.target_passes
        assert record.target_passes == len(record.rounds) > 0
    assert "generate" not in vars(target)
