"""``OVModelForCausalLM`` with its cache, for the decoding loop.

A stateful OpenVINO model keeps its cache inside the infer request, where cropping is expensive:
reading the state, slicing it and setting it again costs more than a pass. So rejected tokens stay,
attention_mask 0 hides them, and the position_ids of later tokens skip them. The cache is compacted
by such a copy only when much of it is hidden.
"""

from __future__ import annotations

from typing import Any

import numpy
import torch

from fastdraft_hf.decode.cached import CachedModel, SlotModel
from fastdraft_hf.decode.openvino.paged import PagedModel, paged, run_request

INPUTS = ("input_ids", "attention_mask", "position_ids", "beam_idx")


def open_openvino(model: Any) -> CachedModel:
    """Return an ``OVModelForCausalLM`` with an empty cache, in pages where possible."""
    pages = paged(model)
    return OpenVINOModel(model) if pages is None else PagedModel(pages)


class OpenVINOModel(SlotModel):
    """A stateful ``OVModelForCausalLM``, run through its infer request.

    Args:
        model: the model. Its cache is emptied.
    """

    # A compaction copies the whole cache, several passes' worth of time.
    waste_factor = 1.5
    waste_slots = 192

    def __init__(self, model: Any) -> None:
        super().__init__(torch.device("cpu"))
        model.compile()
        self._request = model.request
        self._request.reset_state()
        self._inputs = [name for name in INPUTS if name in model.input_names]
        self._beam: Any = None

    def _forward(self, tokens: torch.Tensor, positions: torch.Tensor, keep: int) -> torch.Tensor:
        rows = tokens.shape[0]
        mask = self.mask
        if mask is None:
            mask = torch.ones(rows, self.slots, dtype=torch.bool)
        given = {
            "input_ids": tokens.numpy(),
            "attention_mask": mask.numpy().astype(numpy.int64),
            "position_ids": positions.numpy(),
            "beam_idx": numpy.arange(rows, dtype=numpy.int32) if self._beam is None else self._beam,
        }
        self._beam = None
        inputs = {name: numpy.ascontiguousarray(given[name]) for name in self._inputs}
        logits = run_request(self._request, inputs)
        return torch.from_numpy(logits)[:, -keep:].clone()

    def _crop(self, count: int) -> int:
        return 0

    def _gather(self, order: torch.Tensor) -> None:
        import openvino

        index = order.numpy()[:, None, :, None]
        for state in self._request.query_state():
            data = state.state.data  # [B, heads, slots, width]
            packed = numpy.take_along_axis(data, index, axis=2)
            state.state = openvino.Tensor(numpy.ascontiguousarray(packed))

    def _select(self, rows: torch.Tensor) -> None:
        # The next pass reads row beam_idx[b] of the cache as its row b.
        index = rows.numpy().astype(numpy.int32)
        self._beam = index if self._beam is None else self._beam[index]
