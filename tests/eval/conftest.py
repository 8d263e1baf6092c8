"""Records and a run's summary made by hand, so that every figure can be checked by head."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastdraft_hf.decode.records import DecodingRecord
from fastdraft_hf.eval.summary import RunSummary

MakeRecord = Callable[..., DecodingRecord]


@pytest.fixture(scope="session")
def make_record() -> MakeRecord:
    """Make a record: from rounds, or with the given totals; 10 tokens a second by default."""

    def make(
        rounds: list[tuple[int, int]] | None = None, *, key: str = "k", **given: Any
    ) -> DecodingRecord:
        rounds = rounds or []
        emitted = sum(accepted + 1 for _, accepted in rounds)
        fields: dict[str, Any] = {
            "path": "transformers",
            "task": "humaneval",
            "key": key,
            "temperature": 0.0,
            "num_assistant_tokens": max((d for d, _ in rounds), default=0),
            "tokens": list(range(emitted)),
            "target_passes": len(rounds),
            "drafted": sum(d for d, _ in rounds),
            "accepted": sum(a for _, a in rounds),
            "rounds": rounds,
            **given,
        }
        fields.setdefault("seconds", len(fields["tokens"]) / 10)
        return DecodingRecord(**fields)

    return make


@pytest.fixture
def run_summary() -> RunSummary:
    """A finished run on two task sets; OpenVINO is a speed-up, transformers is none."""
    path = Path(__file__).parents[1] / "synthetic_run.json"
    return RunSummary(**json.loads(path.read_text(encoding="utf-8")))


@pytest.fixture
def bench_results(run_summary: RunSummary) -> dict[str, Any]:
    """The run's benchmark with our loop as well, and its kernels."""
    assert run_summary.bench is not None
    bench: dict[str, Any] = run_summary.bench
    bench["paths"]["ours"] = copy.deepcopy(bench["paths"]["transformers"])
    stock = {"tokens_per_second": 9.0, "kernels_ratio": [1.1, 1.0, 1.2]}
    bench["paths"]["ours"]["overall"]["stock"] = stock
    return bench
