"""The cache in pages: the same numbers as a whole pass, whatever is fed, taken back and left."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from decoding_helpers import load_openvino, write
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaForCausalLM

from fastdraft_hf import FastDraftError
from fastdraft_hf.data import columns
from fastdraft_hf.data.engines import Completion, Request
from fastdraft_hf.data.parts import iter_rows, write_rows
from fastdraft_hf.data.target_logits import write_target_logits
from fastdraft_hf.decode.openvino import paged as module
from fastdraft_hf.decode.openvino.paged import OpenVINOReader, PagedModel, Pages, paged
from fastdraft_hf.decode.speculative import open_cached
from fastdraft_hf.export.parity import EXACT

openvino = pytest.importorskip("openvino")
pytest.importorskip("optimum.intel")

PROMPT = torch.randint(3, 288, (1, 40), generator=torch.Generator().manual_seed(0))
POSITIONS = torch.arange(40)[None]


@pytest.fixture(scope="module")
def pages(openvino_models: Any) -> Pages:
    found = paged(load_openvino(openvino_models.target))
    assert found is not None  # OpenVINO's transformation, or what we read of optimum-intel, moved
    assert found.narrow
    return found


# A step of every row: tokens to feed, and how many of them are taken back; then who stays.
STEPS = st.lists(
    st.tuples(
        st.integers(1, 6),
        st.lists(st.integers(0, 5), min_size=3, max_size=3),
        st.lists(st.integers(0, 5), min_size=3, max_size=3),
        st.one_of(st.none(), st.integers(0, 2)),
    ),
    max_size=5,
)


@given(lengths=st.lists(st.integers(1, 70), min_size=1, max_size=3), steps=STEPS)
def test_every_order_of_feeding_gives_the_dense_logits(
    pages: Pages, target: LlamaForCausalLM, lengths: list[int], steps: Any
) -> None:
    generator = torch.Generator().manual_seed(sum(lengths))
    model = PagedModel(pages)
    texts: list[list[int]] = [[] for _ in lengths]

    def feed(widths: list[int], keep: int) -> None:
        width = max(widths)
        tokens = torch.randint(3, 288, (len(texts), width), generator=generator)
        short = torch.tensor([width - w for w in widths])[:, None]
        valid = torch.arange(width) >= short
        positions = torch.arange(width) - short + torch.tensor([[len(t)] for t in texts])
        every = None if bool(valid.all()) else valid
        logits = model.feed(tokens, positions.clamp(min=0), every, keep)
        for text, row, seen, found in zip(texts, tokens, valid, logits, strict=True):
            text.extend(row[seen].tolist())
            with torch.no_grad():
                dense = target(torch.tensor([text])).logits[0, -keep:]
            torch.testing.assert_close(found, dense, atol=2e-4, rtol=1e-3)
        assert model.slots == max(map(len, texts))

    feed(lengths, 1)
    for width, fewer, back, leaves in steps:
        widths = [max(1, width - f) for f in fewer[: len(texts)]]
        feed(widths, min(widths))
        fed = min(width - 1, *(len(t) - 1 for t in texts), *widths)
        kept = [max(0, fed - b) for b in back[: len(texts)]]
        model.rollback(fed, kept)
        for text, stay in zip(texts, kept, strict=True):
            del text[len(text) - fed + stay :]
        if leaves is not None and len(texts) > 1:
            rows = [n for n in range(len(texts)) if n != leaves % len(texts)]
            model.select(rows)
            texts = [texts[n] for n in rows]


def test_blocks_are_made_as_needed_and_used_again(pages: Pages) -> None:
    model = PagedModel(pages)
    everything = len(pages.free)
    model.feed(PROMPT.repeat(3, 1), POSITIONS.repeat(3, 1), None, 1)
    each = -(-40 // pages.block_size)
    model.select([1])
    assert len(pages.free) == max(everything, 8) - each  # of the two that left, back again
    long = torch.full((1, pages.block_size * 20), 40)
    model.feed(long, 40 + torch.arange(long.shape[1])[None], None, 1)
    grown = len(pages.free) + each + 20
    PagedModel(pages)
    assert len(pages.free) == grown  # a new text begins with all of them, and makes none


def test_the_model_itself_stays_as_it_was(openvino_models: Any, tmp_path: Path) -> None:
    model, draft = load_openvino(openvino_models.target), load_openvino(openvino_models.draft)
    alone = write(model, PROMPT)
    first = paged(model)
    assert model.request is None  # not two copies of the weights
    assert torch.equal(write(model, PROMPT, draft), alone)
    assert torch.equal(write(model, PROMPT), alone)
    request = model.request
    assert request is not None
    assert torch.equal(write(model, PROMPT, draft), alone)
    assert paged(model) is first
    assert model.request is request  # whoever uses both ways does not compile again and again
    model.save_pretrained(tmp_path)
    again = openvino.Core().read_model(tmp_path / "openvino_model.xml")
    assert {port.get_any_name() for port in again.inputs} == set(model.input_names)


@pytest.mark.parametrize(
    "config", [{"PERFORMANCE_HINT": "LATENCY"}, {"KV_CACHE_PRECISION": "bf16"}, EXACT]
)
def test_the_cache_is_rounded_as_the_models_own(
    openvino_models: Any, config: dict[str, str]
) -> None:
    able = openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    if "bf16" in config.values() and "BF16" not in able:
        pytest.skip("this processor has no bfloat16")
    model = load_openvino(openvino_models.target, **config)
    stateful = model.request.get_compiled_model()
    pages = paged(model)
    assert pages is not None
    compiled = pages.request.get_compiled_model()
    for name in ("KV_CACHE_PRECISION", "INFERENCE_PRECISION_HINT", "PERFORMANCE_HINT"):
        assert compiled.get_property(name) == stateful.get_property(name)


@pytest.mark.parametrize("reason", ["transformation", "device", "input", "moved"])
def test_without_pages_the_target_decodes_alone(
    openvino_models: Any,
    target: LlamaForCausalLM,
    monkeypatch: pytest.MonkeyPatch,
    reason: str,
) -> None:
    from openvino import _offline_transformations as transformations

    draft = load_openvino(openvino_models.draft)
    name = "paged_attention_transformation"
    whole = getattr(transformations, name)

    def fails(graph: Any) -> None:
        raise RuntimeError("no attention that can be paged")

    def asks_for_more(graph: Any) -> None:
        whole(graph)
        more = openvino.opset13.parameter([1], openvino.Type.f32, name="more")
        more.output(0).set_names({"more"})
        graph.add_parameters([more])

    if reason == "device":
        monkeypatch.setattr(draft, "_device", "AUTO")
    elif reason == "moved":
        monkeypatch.delattr(transformations, name)
    else:
        other = fails if reason == "transformation" else asks_for_more
        monkeypatch.setattr(transformations, name, other)
    alone = write(target, PROMPT)
    with pytest.warns(UserWarning, match="OVModelForCausalLM cannot have its cache in pages"):
        assert torch.equal(write(target, PROMPT, draft), alone)
    with pytest.raises(FastDraftError, match="cannot have its cache in pages"):
        open_cached(draft)
    if reason != "device":
        with pytest.raises(NotImplementedError, match="no graph with its cache in pages"):
            OpenVINOReader(openvino_models.draft)


@pytest.fixture(scope="module")
def reader(openvino_models: Any) -> OpenVINOReader:
    return OpenVINOReader(openvino_models.target, EXACT)


@pytest.fixture
def small_passes() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_PASS_NUMBERS", 60 * 288)
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
