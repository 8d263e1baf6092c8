"""``OVModelForCausalLM`` with its cache in pages, for the decoding loop.

OpenVINO can turn the stateful graph that optimum-intel exports into one whose attention reads the
cache from blocks (pages) that the caller owns. OpenVINO GenAI runs every model this way. Each row
has its own list of blocks and its own length: rejected tokens are taken back by a smaller length,
nothing is masked or copied, and rows of a batch need no padding. A pass is faster too, since no
mask is computed and another attention kernel runs (benchmarks/openvino_pass.py).

The transformation comes from ``openvino._offline_transformations``, a private module;
tests/decode/test_openvino_paged.py fails when it moves. A model that it cannot change, or that does
not run on a CPU, is decoded without a draft.
"""

import logging
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy
import torch

from fastdraft_hf.data.target_logits import LogitsReader
from fastdraft_hf.decode.cached import CachedModel

# Extra input of the changed graph: the indices of the tokens that get logits.
POSITIONS = "fastdraft_positions"
_INPUTS = {
    "input_ids",
    "position_ids",
    "past_lens",
    "subsequence_begins",
    "block_indices",
    "block_indices_begins",
    "max_context_len",
    POSITIONS,
}
# Operations between the head's product and the logits: casts, biases, scales, soft caps.
_BEHIND = {"Convert", "Add", "Multiply", "Divide", "Tanh", "Reshape", "Pad", "Gather"}
_CACHES = ("key_cache.", "value_cache.")
_MARK = "_fastdraft_pages"
# Most elements of the logits of one pass (a quarter of a GiB). A longer text is read alone.
_PASS_NUMBERS = 2**26

logger = logging.getLogger(__name__)


class Pages:
    """The paged graph of a model, compiled, with the blocks of its cache.

    ``block_size`` is in tokens. ``narrow`` says whether the graph has the input `POSITIONS`.
    """

    def __init__(self, compiled: Any) -> None:
        self.request = compiled.create_infer_request()
        names = {port.get_any_name(): port for port in compiled.inputs}
        self.narrow = POSITIONS in names
        self.vocab_size = int(compiled.output("logits").get_partial_shape()[-1].get_length())
        self.inputs = _INPUTS & set(names)
        # name: shape of one block, element type. The plug-in lays blocks out; only the third
        # dimension of values is known to be the tokens.
        self._kinds = {
            name: ([d.get_length() for d in list(port.get_partial_shape())[1:]], port.element_type)
            for name, port in names.items()
            if name.startswith(_CACHES)
        }
        values = next(shape for name, (shape, _) in self._kinds.items() if "value" in name)
        self.block_size = int(values[1])
        self._memory: dict[str, numpy.ndarray] = {}
        self._count = 0
        self.free: list[int] = []

    def reset(self) -> None:
        """Free every block."""
        self.free = list(range(self._count))[::-1]

    def take(self) -> int:
        """Return the number of a free block; allocate more when there is none."""
        if not self.free:
            self._grow(max(8, 2 * self._count))
        return self.free.pop()

    def _grow(self, count: int) -> None:
        import openvino

        for name, (shape, kind) in self._kinds.items():
            block = math.prod(shape) * kind.bitwidth // 8
            # Zeros: whole blocks are read, and values after the last token must be finite.
            memory = numpy.zeros(count * block, numpy.uint8)
            if name in self._memory:
                memory[: self._memory[name].size] = self._memory[name]
            self._memory[name] = memory
            self.request.set_tensor(name, openvino.Tensor(memory, [count, *shape], kind))
        self.free = list(range(self._count, count))[::-1]
        self._count = count

    def infer(self, given: dict[str, numpy.ndarray]) -> numpy.ndarray:
        """Run the graph and return the logits [positions, V], which the next pass overwrites.

        ``start_async(given)`` would cost more than everything else between passes.
        """
        import openvino

        # The request reads the arrays in place and does not keep them alive.
        self._given = {n: openvino.Tensor(given[n], shared_memory=True) for n in self.inputs}
        for name, tensor in self._given.items():
            self.request.set_tensor(name, tensor)
        self.request.start_async()
        self.request.wait()
        logits: numpy.ndarray = self.request.get_tensor("logits").data
        return logits.reshape(-1, logits.shape[-1])


class PagedModel(CachedModel):
    """An ``OVModelForCausalLM`` in pages.

    All blocks of ``pages`` are freed first.
    """

    def __init__(self, pages: Pages) -> None:
        super().__init__(torch.device("cpu"))
        self._pages = pages
        pages.reset()
        # Each row's length and its blocks, which may be more than its length needs.
        self._past: list[int] = []
        self._blocks: list[list[int]] = []

    def feed(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        valid: torch.Tensor | None,
        keep: int,
    ) -> torch.Tensor:
        rows, width = tokens.shape
        if not self._past:
            self._past, self._blocks = [0] * rows, [[] for _ in range(rows)]
        if valid is None:
            widths = [width] * rows
            ids, positions = tokens.reshape(-1), positions.expand(rows, -1).reshape(-1)
        else:
            valid = valid.bool()
            widths = valid.sum(1).tolist()
            ids, positions = tokens[valid], positions.expand(rows, -1)[valid]
        ends = numpy.cumsum(widths)[:, None] + numpy.arange(-keep, 0)
        logits = self._pass(ids.numpy(), positions.numpy(), widths, ends.reshape(-1))
        self.slots = max(self._past)
        return torch.from_numpy(logits).reshape(rows, keep, -1).clone()

    def read(self, texts: Sequence[Sequence[int]], wanted: Sequence[Sequence[int]]) -> torch.Tensor:
        """Read whole texts, one per row, before anything else; return the logits [positions, V'].

        They are those of ``wanted``, each text's positions from 0. The next pass overwrites them.
        """
        self._past, self._blocks = [0] * len(texts), [[] for _ in texts]
        widths = [len(text) for text in texts]
        begins = numpy.cumsum([0, *widths])
        scored = [numpy.array(w, numpy.int64) + b for w, b in zip(wanted, begins[:-1], strict=True)]
        ids = numpy.concatenate([numpy.array(text, numpy.int64) for text in texts])
        positions = numpy.concatenate([numpy.arange(width) for width in widths])
        return torch.from_numpy(self._pass(ids, positions, widths, numpy.concatenate(scored)))

    def _pass(
        self, ids: numpy.ndarray, positions: numpy.ndarray, widths: list[int], scored: numpy.ndarray
    ) -> numpy.ndarray:
        """Feed ``widths`` tokens of each row, and return the logits [scored, V'] of some."""
        before = self._past
        self._past = [past + new for past, new in zip(before, widths, strict=True)]
        for past, blocks in zip(self._past, self._blocks, strict=True):
            while len(blocks) * self._pages.block_size < past:
                blocks.append(self._pages.take())
        blocks = [block for row in self._blocks for block in row]
        begins = numpy.cumsum([0, *map(len, self._blocks)], dtype=numpy.int32)
        given = {
            "input_ids": numpy.ascontiguousarray(ids),
            "position_ids": numpy.ascontiguousarray(positions),
            "past_lens": numpy.array(before, numpy.int32),
            "subsequence_begins": numpy.cumsum([0, *widths], dtype=numpy.int32),
            "block_indices": numpy.array(blocks, numpy.int32),
            "block_indices_begins": begins,
            "max_context_len": numpy.array(max(self._past), numpy.int32),
            POSITIONS: scored.astype(numpy.int64),
        }
        logits = self._pages.infer(given)
        return logits if self._pages.narrow else logits[scored]

    def rollback(self, fed: int, kept: Sequence[int]) -> None:
        # Later tokens overwrite what lies after a row's length.
        self._past = [past - fed + k for past, k in zip(self._past, kept, strict=True)]
        self.slots = max(self._past)

    def select(self, rows: Sequence[int]) -> None:
        stay = set(rows)
        for row, blocks in enumerate(self._blocks):
            if row not in stay:
                self._pages.free.extend(blocks)
        self._past = [self._past[r] for r in rows]
        self._blocks = [self._blocks[r] for r in rows]
        self.slots = max(self._past)


class OpenVINOReader(LogitsReader):
    """A target in OpenVINO's format, for stage logits: the logits of whole texts.

    The graph in pages reads texts of any lengths in one pass without padding, and its head scores
    only the positions that are needed.

    ``properties`` are the device's, such as ``{"INFERENCE_PRECISION_HINT": "f32"}``.

    Raises:
        NotImplementedError: its graph cannot be changed to pages.
    """

    def __init__(self, folder: Path, properties: dict[str, Any] | None = None) -> None:
        from optimum.intel import OVModelForCausalLM

        model = OVModelForCausalLM.from_pretrained(folder, ov_config=properties, compile=False)
        pages = paged(model)
        if pages is None:
            raise NotImplementedError(f"{folder}: no graph with its cache in pages")
        self._pages = pages
        self.vocab_size = pages.vocab_size

    def read(
        self, texts: Sequence[Sequence[int]], begins: Sequence[int]
    ) -> Iterator[Iterator[torch.Tensor]]:
        most = _PASS_NUMBERS // self.vocab_size
        first = 0
        while first < len(texts):
            last, tokens = first, 0
            while last < len(texts) and (last == first or tokens + len(texts[last]) <= most):
                tokens += len(texts[last])
                last += 1
            part = slice(first, last)
            # The token at t is predicted at t − 1.
            wanted = [
                range(begin - 1, len(text) - 1)
                for text, begin in zip(texts[part], begins[part], strict=True)
            ]
            logits = PagedModel(self._pages).read(texts[part], wanted)
            for one in torch.split(logits, [len(positions) for positions in wanted]):
                yield iter([one])
            first = last


def paged(model: Any) -> Pages | None:
    """Return the graph of an ``OVModelForCausalLM`` in pages, or ``None`` where it is impossible.

    The first call compiles a changed copy of the graph and releases the compiled stateful one,
    since each holds the weights in the plug-in's own layout. optimum-intel compiles it again when
    the model is called by itself; then both stay. ``save_pretrained`` writes the original.
    """
    graph, pages = getattr(model, _MARK, (None, None))
    if graph is not model.model:
        pages = _compile(model)
        setattr(model, _MARK, (model.model, pages))
    return pages


def _compile(model: Any) -> Pages | None:
    import openvino

    graph, device = model.model, str(getattr(model, "_device", "")).upper()
    # A model that was loaded compiled has no graph; other devices have other block layouts.
    if device != "CPU" or not isinstance(graph, openvino.Model):
        return None
    try:
        from openvino._offline_transformations import paged_attention_transformation

        changed = graph.clone()
        paged_attention_transformation(changed)
        _score_positions(changed)
        reason = _not_understood(changed)
        if reason is None:
            model.clear_requests()
            return Pages(openvino.Core().compile_model(changed, device, model.ov_config))
    except (ImportError, RuntimeError) as error:  # such as a cache precision the CPU does not have
        reason = " ".join(str(error).split())[:300]
    name = type(model).__name__
    logger.warning("OpenVINO: the cache of %s cannot be in pages: %s", name, reason)
    return None


def _not_understood(graph: Any) -> str | None:
    """Return what the changed graph has beside the inputs that we feed, or ``None``."""
    if any(node.get_type_name() == "ReadValue" for node in graph.get_ops()):
        return "part of the cache stays in the graph"
    ports = {port.get_any_name(): port for port in graph.inputs}
    for name, port in ports.items():
        if name not in _INPUTS and not name.startswith(_CACHES):
            return f"the graph has an input {name}"
        if name == "position_ids" and port.get_partial_shape().rank.get_length() != 1:
            return "positions have several dimensions"
    if not any(name.startswith(_CACHES[0]) for name in ports):
        return "the graph has no cache"
    return None if "logits" in graph.outputs[0].get_names() else "the graph has no logits"


def _score_positions(graph: Any) -> None:
    """Let the head read only the tokens in `POSITIONS`, where the head can be found."""
    import openvino
    from openvino import opset13 as ops

    head = _head(graph)
    if head is None:
        return
    hidden = head.input_value(0)
    shape = hidden.get_partial_shape()
    if shape.rank.get_length() != 3 or not shape[0].is_dynamic or shape[1].is_dynamic:
        return
    positions = ops.parameter(openvino.PartialShape([-1]), openvino.Type.i64, name=POSITIONS)
    positions.output(0).set_names({POSITIONS})
    axis = ops.constant(numpy.array(0, dtype=numpy.int64))
    head.input(0).replace_source_output(ops.gather(hidden, positions, axis).output(0))
    graph.add_parameters([positions])
    graph.validate_nodes_and_infer_types()


def _head(graph: Any) -> Any:
    """Return the product that gives the logits [B, n, V], or ``None``."""
    results = [r for r in graph.get_results() if "logits" in r.input_value(0).get_names()]
    if len(results) != 1 or len(results[0].input_value(0).get_partial_shape()) != 3:
        return None
    node = results[0].input_value(0).get_node()
    while node.get_type_name() in _BEHIND:
        node = node.input_value(0).get_node()
    return node if node.get_type_name() == "MatMul" else None
