"""Give any language model its own draft: FastDraft (arXiv 2411.11055) for Hugging Face.

Heavy parts are imported when they are first asked for, so that ``import fastdraft_hf`` and
``fastdraft --help`` answer at once.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

# TRL and the Hub's client tell their makers what runs. That is for a user to switch on, not for a
# tool; the Hub's client reads this when it is imported, so it is said before.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

__version__ = "0.1.0"

_LAZY = {
    "DraftDistillationTrainer": "fastdraft_hf.training.trainer",
    "DraftDistillationConfig": "fastdraft_hf.training.arguments",
    "fused_head_loss": "fastdraft_hf.training.head",
    "Objective": "fastdraft_hf.training.objectives",
    "Pair": "fastdraft_hf.training.objectives",
    "Term": "fastdraft_hf.training.objectives",
    "register_term": "fastdraft_hf.training.objectives",
    "NonFiniteLossError": "fastdraft_hf.training.failures",
    "design_draft": "fastdraft_hf.drafts.design",
    "DesignConfig": "fastdraft_hf.drafts.config",
    "load_draft": "fastdraft_hf.drafts.trimmed_head",
    "embedded_target": "fastdraft_hf.targets.embedded",
    "resolve_target": "fastdraft_hf.targets.resolve",
    "acceptance_rate": "fastdraft_hf.evaluation.metrics",
    "block_efficiency": "fastdraft_hf.evaluation.metrics",
    "mbsu": "fastdraft_hf.evaluation.metrics",
    "metric_path": "fastdraft_hf.evaluation.modules",
    "assisted_decoding": "fastdraft_hf.decoding.speculative",
    "openvino_pipeline": "fastdraft_hf.decoding.openvino",
    "record_rounds": "fastdraft_hf.decoding.assisted",
    "record_decoding": "fastdraft_hf.decoding.recorder",
    "record_result": "fastdraft_hf.decoding.openvino",
    "DecodingRecords": "fastdraft_hf.decoding.record_list",
    "FastDraftError": "fastdraft_hf._errors",
}

__all__ = ["__version__", *_LAZY]

if TYPE_CHECKING:
    from fastdraft_hf._errors import FastDraftError as FastDraftError
    from fastdraft_hf.decoding.assisted import record_rounds as record_rounds
    from fastdraft_hf.decoding.openvino import openvino_pipeline as openvino_pipeline
    from fastdraft_hf.decoding.openvino import record_result as record_result
    from fastdraft_hf.decoding.record_list import DecodingRecords as DecodingRecords
    from fastdraft_hf.decoding.recorder import record_decoding as record_decoding
    from fastdraft_hf.decoding.speculative import assisted_decoding as assisted_decoding
    from fastdraft_hf.drafts.config import DesignConfig as DesignConfig
    from fastdraft_hf.drafts.design import design_draft as design_draft
    from fastdraft_hf.drafts.trimmed_head import load_draft as load_draft
    from fastdraft_hf.evaluation.metrics import acceptance_rate as acceptance_rate
    from fastdraft_hf.evaluation.metrics import block_efficiency as block_efficiency
    from fastdraft_hf.evaluation.metrics import mbsu as mbsu
    from fastdraft_hf.evaluation.modules import metric_path as metric_path
    from fastdraft_hf.targets.embedded import embedded_target as embedded_target
    from fastdraft_hf.targets.resolve import resolve_target as resolve_target
    from fastdraft_hf.training.arguments import DraftDistillationConfig as DraftDistillationConfig
    from fastdraft_hf.training.failures import NonFiniteLossError as NonFiniteLossError
    from fastdraft_hf.training.head import fused_head_loss as fused_head_loss
    from fastdraft_hf.training.objectives import Objective as Objective
    from fastdraft_hf.training.objectives import Pair as Pair
    from fastdraft_hf.training.objectives import Term as Term
    from fastdraft_hf.training.objectives import register_term as register_term
    from fastdraft_hf.training.trainer import DraftDistillationTrainer as DraftDistillationTrainer


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'fastdraft_hf' has no attribute '{name}'")
    return getattr(importlib.import_module(_LAZY[name]), name)
