"""Give any language model its own draft: FastDraft (arXiv 2411.11055) for Hugging Face.

Heavy modules are imported on first use, so that ``import fastdraft_hf`` and ``fastdraft --help``
answer at once.
"""

import importlib
import os
from typing import TYPE_CHECKING, Any

# No telemetry of TRL and the Hub's client unless the user turns it on. Read when they are imported.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
# Huge pages for large tensors: each step of training allocates gradients of the size of the
# vocabulary, and a CPU spends a fifth of the step on their page faults. Read by torch at its first
# allocation.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

__version__ = "0.1.0"

_LAZY = {
    "DraftDistillationTrainer": "fastdraft_hf.train.trainer",
    "DraftDistillationConfig": "fastdraft_hf.train.config",
    "fused_head_loss": "fastdraft_hf.train.head",
    "Objective": "fastdraft_hf.train.objectives",
    "Pair": "fastdraft_hf.train.objectives",
    "Term": "fastdraft_hf.train.objectives",
    "register_term": "fastdraft_hf.train.objectives",
    "NonFiniteLossError": "fastdraft_hf.train.checks",
    "build_draft": "fastdraft_hf.draft.build",
    "save_draft": "fastdraft_hf.draft.build",
    "load_draft": "fastdraft_hf.draft.reduced_vocabulary",
    "embedded_target": "fastdraft_hf.target.embedded",
    "resolve_target": "fastdraft_hf.target.resolve",
    "acceptance_rate": "fastdraft_hf.eval.metrics",
    "block_efficiency": "fastdraft_hf.eval.metrics",
    "mbsu": "fastdraft_hf.eval.metrics",
    "metric_path": "fastdraft_hf.eval.modules",
    "assisted_decoding": "fastdraft_hf.decode.speculative",
    "openvino_pipeline": "fastdraft_hf.decode.openvino.pipeline",
    "record_rounds": "fastdraft_hf.decode.assisted",
    "record_decoding": "fastdraft_hf.decode.assisted",
    "record_result": "fastdraft_hf.decode.openvino.pipeline",
    "DecodingRecords": "fastdraft_hf.decode.records",
    "FastDraftError": "fastdraft_hf._errors",
}

__all__ = ["__version__", *_LAZY]

if TYPE_CHECKING:
    from fastdraft_hf._errors import FastDraftError as FastDraftError
    from fastdraft_hf.decode.assisted import record_decoding as record_decoding
    from fastdraft_hf.decode.assisted import record_rounds as record_rounds
    from fastdraft_hf.decode.openvino.pipeline import openvino_pipeline as openvino_pipeline
    from fastdraft_hf.decode.openvino.pipeline import record_result as record_result
    from fastdraft_hf.decode.records import DecodingRecords as DecodingRecords
    from fastdraft_hf.decode.speculative import assisted_decoding as assisted_decoding
    from fastdraft_hf.draft.build import build_draft as build_draft
    from fastdraft_hf.draft.build import save_draft as save_draft
    from fastdraft_hf.draft.reduced_vocabulary import load_draft as load_draft
    from fastdraft_hf.eval.metrics import acceptance_rate as acceptance_rate
    from fastdraft_hf.eval.metrics import block_efficiency as block_efficiency
    from fastdraft_hf.eval.metrics import mbsu as mbsu
    from fastdraft_hf.eval.modules import metric_path as metric_path
    from fastdraft_hf.target.embedded import embedded_target as embedded_target
    from fastdraft_hf.target.resolve import resolve_target as resolve_target
    from fastdraft_hf.train.checks import NonFiniteLossError as NonFiniteLossError
    from fastdraft_hf.train.config import DraftDistillationConfig as DraftDistillationConfig
    from fastdraft_hf.train.head import fused_head_loss as fused_head_loss
    from fastdraft_hf.train.objectives import Objective as Objective
    from fastdraft_hf.train.objectives import Pair as Pair
    from fastdraft_hf.train.objectives import Term as Term
    from fastdraft_hf.train.objectives import register_term as register_term
    from fastdraft_hf.train.trainer import DraftDistillationTrainer as DraftDistillationTrainer


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'fastdraft_hf' has no attribute '{name}'")
    return getattr(importlib.import_module(_LAZY[name]), name)
