"""Sharded drafts: what is refused, and how the head is kept in one piece."""

from __future__ import annotations

import os
from typing import Any

import torch
from accelerate.utils import parse_flag_from_env
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from fastdraft_hf._errors import FastDraftError
from fastdraft_hf.train.config import DraftDistillationConfig


def check_sharding(args: DraftDistillationConfig) -> None:
    """Refuse ways of sharding that the loss, Muon or weight averaging cannot work with.

    Raises:
        FastDraftError: DeepSpeed ZeRO-3, FSDP's first version, Muon with FSDP or DeepSpeed, or
            ``start_weight`` with FSDP.
    """
    deepspeed = args.deepspeed_plugin
    if deepspeed is not None and deepspeed.zero_stage == 3:
        raise FastDraftError(
            "DeepSpeed ZeRO-3 shards the draft's head, which the loss needs whole; use "
            "zero_stage 2 (recipes/accelerate/deepspeed_zero2.yaml) or FSDP2"
        )
    fsdp = bool(args.fsdp) or parse_flag_from_env("ACCELERATE_USE_FSDP")
    # The trainer's arguments go before the launcher's environment.
    version = int((args.fsdp_plugin_args or {}).get("fsdp_version", os.getenv("FSDP_VERSION", 1)))
    if fsdp and version != 2:
        raise FastDraftError(
            "the first version of FSDP shards the draft's head, which the loss needs whole; set "
            "fsdp_version: 2 (recipes/accelerate/fsdp2.yaml)"
        )
    if args.use_muon and (fsdp or deepspeed is not None):
        raise FastDraftError(
            "use_muon: Muon needs unsharded matrices, and FSDP and DeepSpeed shard them; set "
            "use_muon to false"
        )
    if args.start_weight and fsdp:
        raise FastDraftError("start_weight: FSDP shards the weights; set it to 0 or use DDP")


def keep_head_whole(model: Any) -> None:
    """Have FSDP2 keep the head unsharded between the forward and the backward pass.

    FSDP2 gathers parameters while their module runs, shards them again after it, and gathers them
    once more when a gradient by the module's output arrives. The loss uses the head after the
    forward pass and never the logits that came out of it, so nothing would gather it again, and
    the backward pass would read freed memory. Since accelerate 1.15 this is already so.

    Args:
        model: the unwrapped draft, sharded by FSDP2 or not.
    """
    for module in (model, model.get_output_embeddings()):
        if isinstance(module, FSDPModule):
            module.set_reshard_after_forward(False, recurse=False)


def check_whole(weight: torch.Tensor) -> torch.Tensor:
    """Return the head's weight.

    Raises:
        FastDraftError: it is sharded all the same (tensor parallelism, say).
    """
    if isinstance(weight, DTensor):
        raise FastDraftError(
            "the draft's head is sharded over devices where the loss needs it whole; use data "
            "parallelism or FSDP2"
        )
    return weight
