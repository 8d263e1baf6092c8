import itertools
from collections.abc import Callable
from typing import Any

import pytest
from transformers import LlamaForCausalLM

from fastdraft_hf.decode.assisted import decode
from fastdraft_hf.decode.openvino.pipeline import OpenVINODecoder, openvino_pipeline, record_result
from fastdraft_hf.decode.records import DecodingRecord, DecodingRecords
from fastdraft_hf.eval.metrics import acceptance_rate, block_efficiency

pytest.importorskip("openvino_genai")

TinyModel = Callable[..., LlamaForCausalLM]
PROMPTS = ([40, 41, 42], [70, 33, 250, 9], [100])
EOS = 2


def run(decoder: OpenVINODecoder, prompt: list[int], gamma: int = 0) -> DecodingRecord:
    fields: dict[str, Any] = {"task": "t", "key": "k", "stop_ids": {EOS}}
    return decoder.decode(prompt, max_new_tokens=12, num_assistant_tokens=gamma, **fields)


@pytest.mark.parametrize(
    ("path", "gammas"), [("openvino", (0,)), ("openvino-prompt-lookup", (1, 4))]
)
def test_without_a_draft_it_writes_what_transformers_writes(
    openvino_models: Any, tiny_model: TinyModel, path: str, gammas: tuple[int, ...]
) -> None:
    decoder = OpenVINODecoder(openvino_models.target, prompt_lookup="lookup" in path)
    for prompt, gamma in itertools.product([*PROMPTS, [40, 41, 42, 43] * 4], gammas):
        record = run(decoder, prompt, gamma)
        assert record.tokens == decode(tiny_model(), prompt, max_new_tokens=12).tokens
        assert (record.path, record.task, record.key) == (path, "t", "k")
        assert (record.drafted, record.num_assistant_tokens) == (0, gamma)
        assert record.target_passes == len(record.tokens) - record.accepted
        assert 0 <= record.accepted <= (len(record.tokens) - 1 if gamma else 0)
        assert record.first_token_seconds is not None
        assert 0 < record.first_token_seconds < record.seconds


@pytest.mark.parametrize("gamma", [1, 3, 5])
@pytest.mark.parametrize("itself", [True, False], ids=["itself", "another"])
def test_greedy_output_does_not_depend_on_the_draft(
    openvino_models: Any, itself: bool, gamma: int
) -> None:
    target = openvino_models.target
    alone = OpenVINODecoder(target)
    assisted = OpenVINODecoder(target, target if itself else openvino_models.draft)
    for prompt in PROMPTS:
        record = run(assisted, prompt, gamma)
        assert record.tokens == run(alone, prompt).tokens
        assert record.num_assistant_tokens == gamma
        assert record.accepted <= record.drafted
        assert record.drafted > 0
        assert record.target_passes == len(record.tokens) - record.accepted > 0
        if itself:
            # All is accepted, but OpenVINO may draft past the end of the answer once.
            assert record.drafted - record.accepted <= gamma
            assert record.accepted > 0
        else:
            assert record.accepted < record.drafted


@pytest.mark.parametrize("drafted", [True, False], ids=["assisted", "alone"])
def test_a_result_of_a_pipeline_becomes_a_record(openvino_models: Any, drafted: bool) -> None:
    import numpy
    import openvino
    import openvino_genai

    target = openvino_models.target
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
        # GenAI reports per cent in some releases and a share in others.
        assert acceptance_rate([one]) == pytest.approx(rate / 100 if rate > 1 else rate, abs=0.01)

    # For text GenAI reports the number of ids only; several prompts are one record.
    texts = record_result(pipeline.generate(["the cat", "on that"], config), 3)
    assert texts.tokens == []
    assert texts.new_tokens == texts.accepted + texts.target_passes
    assert 2 <= texts.new_tokens <= 24
    columns = DecodingRecords([one, texts]).columns()
    assert columns["new_tokens"] == [one.new_tokens, texts.new_tokens]
    assert block_efficiency([one, texts]) == sum(columns["new_tokens"]) / sum(
        columns["target_passes"]
    )
