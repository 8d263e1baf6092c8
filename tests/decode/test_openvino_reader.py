"""Reading texts over OpenVINO: the logits of a plain forward pass of each text alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaForCausalLM

from fastdraft_hf.data import columns
from fastdraft_hf.data.engines import Completion, Request
from fastdraft_hf.data.generations import write_rows
from fastdraft_hf.data.parts import iter_rows
from fastdraft_hf.data.target_logits import write_target_logits
from fastdraft_hf.decode.openvino import reader as openvino_reader
from fastdraft_hf.decode.openvino.reader import OpenVINOReader
from fastdraft_hf.export.parity import EXACT

pytest.importorskip("openvino")
pytest.importorskip("optimum.intel")


@pytest.fixture(scope="module")
def reader(openvino_models: Any) -> OpenVINOReader:
    return OpenVINOReader(openvino_models.target, EXACT)


@pytest.fixture
def small_passes() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(openvino_reader, "_PASS_NUMBERS", 60 * 288)
        yield


TEXTS = st.lists(st.tuples(st.integers(2, 80), st.integers(1, 79)), min_size=1, max_size=6)


@given(lengths=TEXTS)
def test_logits_are_those_of_a_text_alone(
    reader: OpenVINOReader,
    target: LlamaForCausalLM,
    small_passes: None,
    lengths: list[tuple[int, int]],
) -> None:
    generator = torch.Generator().manual_seed(len(lengths))
    texts = [torch.randint(3, 288, (n,), generator=generator).tolist() for n, _ in lengths]
    begins = [min(begin, n - 1) for n, begin in lengths]
    found = [torch.cat([part.clone() for part in parts]) for parts in reader.read(texts, begins)]
    assert len(found) == len(texts)
    for text, begin, logits in zip(texts, begins, found, strict=True):
        with torch.no_grad():
            dense = target(torch.tensor([text])).logits[0, begin - 1 : -1]
        torch.testing.assert_close(logits, dense, atol=2e-4, rtol=1e-3)


def test_what_is_stored_is_what_the_torch_model_stores(
    reader: OpenVINOReader, target: LlamaForCausalLM, tmp_path: Path
) -> None:
    generator = torch.Generator().manual_seed(1)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, 288, (count,), generator=generator).tolist())

    class Writer:
        name = "writer"

        def generate(self, requests: Any, on_tokens: Any) -> Any:
            for request in requests:
                yield Completion(request, ids(request.max_new_tokens), "length")

    shapes = [(5, 9), (0, 4), (0, 1), (30, 70), (1, 1)]
    requests = [
        Request(number, ids(prompt), 0.0, number, count, "s")
        for number, (prompt, count) in enumerate(shapes)
    ]
    write_rows(Writer(), requests, tmp_path / "rows")
    for name, model in (("openvino", reader), ("torch", target)):
        write_target_logits(model, tmp_path / "rows", tmp_path / name, top_k=5, temperature=0.7)
    stored = [list(iter_rows(tmp_path / name)) for name in ("openvino", "torch")]
    for ours, wanted in zip(*stored, strict=True):
        assert ours["input_ids"] == wanted["input_ids"]
        found, expected = columns.stored(ours), columns.stored(wanted)
        np.testing.assert_array_equal(found[0], expected[0])
        if found[1].size:  # nearly equal ids may change places
            assert (found[1] == expected[1]).mean() > 0.95
        np.testing.assert_allclose(found[2], expected[2], atol=2e-3, rtol=2e-3)
        tails = [np.array(row[columns.TAIL]) for row in (ours, wanted)]
        np.testing.assert_allclose(*tails, atol=2e-3, rtol=2e-3)


def test_a_graph_without_pages_is_refused(
    openvino_models: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openvino_reader, "paged", lambda model: None)
    with pytest.raises(NotImplementedError, match="no graph with its cache in pages"):
        OpenVINOReader(openvino_models.target)
