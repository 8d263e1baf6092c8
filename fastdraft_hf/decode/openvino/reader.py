"""Stage logits on a CPU: the target's logits over whole texts, through OpenVINO.

The graph in pages reads texts of any lengths in one pass without padding, and its head scores only
the positions that are needed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from fastdraft_hf.data.target_logits import LogitsReader
from fastdraft_hf.decode.openvino.paged import PagedModel, paged

# Most elements of the logits of one pass (a quarter of a GiB). A longer text is read alone.
_PASS_NUMBERS = 2**26


class OpenVINOReader(LogitsReader):
    """A target in OpenVINO's format.

    Args:
        folder: the exported target.
        properties: of the OpenVINO device, such as ``{"INFERENCE_PRECISION_HINT": "f32"}``.

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
