"""Compare passes of the target through OVModelForCausalLM's graph and OpenVINO GenAI's.

    python benchmarks/openvino_pass.py --draft-openvino DIR [--rounds 5]

The embedded target in int8 after ``--context`` tokens, in one process and in turn: the stateful
graph that `optimum-intel` runs, with its cache in several precisions, over one and over three
tokens; the same graph with its cache in pages, as our loop runs it; and GenAI's own measurement of
passes over three tokens (two drafted and one more). Medians and quartiles in milliseconds. Then how
the stateful graph's time divides into kinds of operations, over one token and over four.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import openvino
import openvino_genai
import torch
from optimum.intel import OVModelForCausalLM

from fastdraft_hf import embedded_target
from fastdraft_hf.decode.openvino.paged import PagedModel, Pages, paged
from fastdraft_hf.export.openvino import cached_openvino

LATENCY = {"PERFORMANCE_HINT": "LATENCY"}
GRAPHS: dict[str, dict[str, Any]] = {
    "stateful": {},
    "stateful, cache in bf16": {"KV_CACHE_PRECISION": "bf16"},
    "stateful, cache in f32": {"KV_CACHE_PRECISION": "f32"},
}
# The first passes of each width compile kernels.
WARM = 3
PASSES = 12


def feed(ids: numpy.ndarray, total: int) -> dict[str, numpy.ndarray]:
    """Return the inputs of a pass over ``ids`` [1, n], the last of ``total`` tokens."""
    return {
        "input_ids": ids,
        "attention_mask": numpy.ones((1, total), numpy.int64),
        "position_ids": numpy.arange(total - ids.shape[1], total)[None],
        "beam_idx": numpy.zeros(1, numpy.int32),
    }


def stateful(request: Any, prompt: numpy.ndarray, width: int) -> Iterator[float]:
    """Yield the milliseconds of each pass over ``width`` tokens after the prompt."""
    request.reset_state()
    total = prompt.shape[1]
    request.infer(feed(prompt, total), share_inputs=True)
    for step in range(PASSES):
        total += width
        inputs = feed(numpy.full((1, width), 1500 + step), total)
        start = time.perf_counter()
        request.infer(inputs, share_inputs=True, share_outputs=True)
        spent = time.perf_counter() - start
        if step >= WARM:
            yield 1e3 * spent


def in_pages(pages: Pages, prompt: numpy.ndarray, width: int) -> Iterator[float]:
    """Yield the same for the graph with its cache in pages."""
    model = PagedModel(pages)
    total = prompt.shape[1]
    model.feed(torch.from_numpy(prompt), torch.arange(total)[None], None, 1)
    for step in range(PASSES):
        ids, positions = torch.full((1, width), 1500 + step), total + torch.arange(width)[None]
        total += width
        start = time.perf_counter()
        model.feed(ids, positions, None, width)
        spent = time.perf_counter() - start
        if step >= WARM:
            yield 1e3 * spent


def genai(pipeline: Any, prompt: numpy.ndarray) -> list[float]:
    """Return the milliseconds of GenAI's passes of the target while a draft proposes two tokens."""
    config = openvino_genai.GenerationConfig()
    config.max_new_tokens = 2 * PASSES
    config.num_assistant_tokens = 2
    config.ignore_eos = True
    result = pipeline.generate(openvino.Tensor(prompt), config)
    metrics = result.extended_perf_metrics.main_model_metrics.raw_metrics
    return [one / 1e3 for one in metrics.m_durations][WARM:]


def operations(request: Any, prompt: numpy.ndarray, width: int) -> Counter[str]:
    """Return the milliseconds that each kind of operation takes in passes, the median of them."""
    passes: list[Counter[str]] = []
    for _ in stateful(request, prompt, width):
        spent: Counter[str] = Counter()
        for one in request.profiling_info:
            spent[one.node_type] += one.real_time.total_seconds() * 1e3
        passes.append(spent)
    kinds = {kind for spent in passes for kind in spent}
    return Counter({k: float(numpy.median([p[k] for p in passes])) for k in kinds})


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--draft-openvino", type=Path, required=True, help="an int8 draft's folder")
    parser.add_argument("--context", type=int, default=200, help="tokens before the passes")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    folder = cached_openvino(embedded_target(), "int8")
    core = openvino.Core()
    model = core.read_model(folder / "openvino_model.xml")
    requests = {
        name: core.compile_model(model, "CPU", {**LATENCY, **given}).create_infer_request()
        for name, given in GRAPHS.items()
    }
    pages = paged(OVModelForCausalLM.from_pretrained(folder))
    assert pages is not None
    scheduler = openvino_genai.SchedulerConfig()
    scheduler.cache_size = 1
    pipeline = openvino_genai.LLMPipeline(
        str(folder),
        "CPU",
        scheduler_config=scheduler,
        draft_model=openvino_genai.draft_model(str(args.draft_openvino), "CPU"),
    )
    prompt = numpy.arange(1000, 1000 + args.context, dtype=numpy.int64)[None]
    found: dict[tuple[str, int], list[float]] = {}
    for _ in range(args.rounds):
        for name, request in requests.items():
            for width in (1, 3):
                found.setdefault((name, width), []).extend(stateful(request, prompt, width))
        for width in (1, 3):
            found.setdefault(("pages", width), []).extend(in_pages(pages, prompt, width))
        found.setdefault(("GenAI's pages", 3), []).extend(genai(pipeline, prompt))
    for (name, width), times in found.items():
        low, median, high = numpy.percentile(times, [25, 50, 75])
        print(f"{name:<26} {width} tokens  {median:5.2f} ms ({low:.2f} to {high:.2f})")
    counting = core.compile_model(model, "CPU", {**LATENCY, "PERF_COUNT": True})
    for width in (1, 4):
        spent = operations(counting.create_infer_request(), prompt, width)
        shown = ", ".join(f"{kind} {time:.2f}" for kind, time in spent.most_common(4))
        print(f"operations, {width} tokens, ms: {shown}")


if __name__ == "__main__":
    main()
