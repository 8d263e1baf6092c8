from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaForCausalLM

from fastdraft_hf.decode.assisted import decode
from fastdraft_hf.decode.openvino.pipeline import OpenVINODecoder, openvino_pipeline, record_result
from fastdraft_hf.decode.records import DecodingRecord, DecodingRecords
from fastdraft_hf.eval.metrics import acceptance_rate, block_efficiency

pytest.importorskip("openvino_genai")

PROMPTS = ([40, 41, 42], [70, 33, 250, 9], [100])
EOS = 2


@pytest.fixture(scope="module")
def folders(openvino_models: Any) -> tuple[Path, Path]:
    """The tiny target and a draft that is right now and then, as OpenVINO."""
    return openvino_models.target, openvino_models.draft


def run(decoder: OpenVINODecoder, prompt: list[int], gamma: int = 0) -> DecodingRecord:
    return decoder.decode(
        prompt,
        task="t",
        key="k",
        max_new_tokens=12,
        stop_ids={EOS},
        num_assistant_tokens=gamma,
    )


def test_alone_it_writes_what_transformers_writes(
    folders: tuple[Path, Path], tiny_model: Callable[..., LlamaForCausalLM]
) -> None:
    decoder, model = OpenVINODecoder(folders[0]), tiny_model()
    for prompt in PROMPTS:
        record = run(decoder, prompt)
        plain = decode(
            model, prompt, task="t", key="k", max_new_tokens=12, temperature=0.0, seed=0
        ).tokens
        assert record.tokens == plain
        assert (record.path, record.task, record.key) == ("openvino", "t", "k")
        assert (record.drafted, record.accepted, record.num_assistant_tokens) == (0, 0, 0)
        assert record.target_passes == len(record.tokens)
        assert record.first_token_seconds is not None
        assert 0 < record.first_token_seconds < record.seconds


@pytest.mark.parametrize("gamma", [1, 3, 5])
@pytest.mark.parametrize("itself", [True, False], ids=["itself", "another"])
def test_greedy_output_does_not_depend_on_the_draft(
    folders: tuple[Path, Path], itself: bool, gamma: int
) -> None:
    target, draft = folders
    alone = OpenVINODecoder(target)
    assisted = OpenVINODecoder(target, target if itself else draft)
    for prompt in PROMPTS:
        record = run(assisted, prompt, gamma)
        assert record.tokens == run(alone, prompt).tokens
        assert record.num_assistant_tokens == gamma
        assert 0 <= record.accepted <= record.drafted
        assert record.drafted > 0
        assert record.accepted < len(record.tokens)
        assert record.target_passes == len(record.tokens) - record.accepted
        if itself:
            # All is accepted, but OpenVINO may draft past the end of the answer once.
            assert record.drafted - record.accepted <= gamma
            assert record.accepted >= len(record.tokens) * gamma // (gamma + 1) - gamma
            assert record.accepted > 0
        else:
            assert record.accepted < record.drafted


@pytest.mark.parametrize("gamma", [1, 4])
def test_prompt_lookup_writes_what_the_target_writes(
    folders: tuple[Path, Path], gamma: int
) -> None:
    alone = OpenVINODecoder(folders[0])
    lookup = OpenVINODecoder(folders[0], prompt_lookup=True)
    repeated = [40, 41, 42, 43] * 4
    for prompt in [*PROMPTS, repeated]:
        record = run(lookup, prompt, gamma)
        assert record.tokens == run(alone, prompt).tokens
        assert record.path == "openvino-prompt-lookup"
        assert record.num_assistant_tokens == gamma
        assert record.target_passes == len(record.tokens) - record.accepted
        assert 0 <= record.accepted < len(record.tokens)
        assert record.first_token_seconds is not None


@pytest.mark.parametrize("drafted", [True, False], ids=["assisted", "alone"])
def test_a_result_of_a_pipeline_becomes_a_record(folders: tuple[Path, Path], drafted: bool) -> None:
    import numpy
    import openvino
    import openvino_genai

    target = folders[0]
    if drafted:
        pipeline = openvino_pipeline(target, target)
    else:
        pipeline = openvino_genai.LLMPipeline(str(target), "CPU")
    config = pipeline.get_generation_config()
    config.max_new_tokens = 12
    config.apply_chat_template = False
    gamma = 3 if drafted else 0

    ids = openvino.Tensor(numpy.array([PROMPTS[0]], dtype=numpy.int64))
    encoded = pipeline.generate(ids, config)
    one = record_result(encoded, 3, task="t", key="a")
    assert (one.path, one.task, one.key, one.num_assistant_tokens) == ("openvino", "t", "a", gamma)
    assert one.tokens == list(encoded.tokens[0])
    assert one.new_tokens == len(one.tokens) == one.accepted + one.target_passes
    assert 0 <= one.accepted <= one.drafted
    assert (one.accepted > 0) is drafted
    assert one.seconds > 0
    if drafted:
        rate = encoded.extended_perf_metrics.get_draft_acceptance_rate()
        # GenAI tells per cent in some releases and a share in others.
        assert acceptance_rate([one]) == pytest.approx(rate / 100 if rate > 1 else rate, abs=0.01)

    # Of text the ids are not told, but their number is; several prompts are one record.
    texts = record_result(pipeline.generate(["the cat", "on that"], config), 3)
    assert texts.tokens == []
    assert texts.new_tokens == texts.accepted + texts.target_passes
    assert 2 <= texts.new_tokens <= 24
    columns = DecodingRecords([one, texts]).columns()
    assert columns["new_tokens"] == [one.new_tokens, texts.new_tokens]
    assert block_efficiency([one, texts]) == sum(columns["new_tokens"]) / sum(
        columns["target_passes"]
    )
