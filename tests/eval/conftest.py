"""Records and a run's summary made by hand, so that every figure can be checked by head."""

from __future__ import annotations

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
def bench_results() -> dict[str, Any]:
    """``results.json`` of a benchmark with every kind of figure it can hold."""

    def figures(alone: float, gammas: dict[int, float]) -> dict[str, Any]:
        best = max(gammas, key=lambda gamma: gammas[gamma])
        ratio = gammas[best] / alone
        return {
            "alone_tokens_per_second": alone,
            "alone_first_token_seconds": 0.04,
            "sweep": {
                str(gamma): {
                    "tokens_per_second": speed,
                    "first_token_seconds": 0.05,
                    "ratio": [speed / alone, speed / alone - 0.1, speed / alone + 0.1],
                    "acceptance_rate": 0.4,
                    "block_efficiency": 1.8,
                }
                for gamma, speed in gammas.items()
            },
            "best_num_assistant_tokens": best,
            "judged": {"ratio": [ratio - 0.05, ratio - 0.2, ratio + 0.1]},
            "is_speed_up": ratio - 0.2 > 1,
        }

    paths: dict[str, Any] = {}
    for name, alone, gammas in (
        ("transformers", 10.0, {1: 8.0, 3: 9.0}),
        ("ours", 10.0, {1: 12.0, 3: 14.3}),
        ("prompt-lookup", 10.0, {1: 11.0, 3: 10.0}),
        ("ours/reduced", 10.0, {1: 9.0, 3: 8.0}),
        ("openvino", 100.0, {1: 130.0, 3: 120.0}),
    ):
        found, (path, _, draft) = figures(alone, gammas), name.partition("/")
        tasks = {"humaneval": found, "ifbench": found}
        paths[name] = {"path": path, "draft": draft, "tasks": tasks, "overall": found}
    paths["ours"]["overall"]["stock"] = {
        "tokens_per_second": 9.0,
        "kernels_ratio": [1.1, 1.0, 1.2],
        "best_ratio": [1.6, 1.5, 1.7],
    }
    return {
        "prompts": {"drawn": 4, "measured": 4},
        "paths": paths,
        "best": {
            "path": "openvino",
            "draft": "",
            "num_assistant_tokens": 1,
            "tokens_per_second": 130.0,
            "judged": paths["openvino"]["overall"]["judged"],
            "is_speed_up": True,
            "fastest_alone": {"engine": "openvino-alone", "tokens_per_second": 100.0},
        },
    }
