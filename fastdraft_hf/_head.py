"""A causal language model's head, and what goes into it."""

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Head:
    """A language-model head.

    Attributes:
        weight: [V, H].
        bias: [V].
        scale: factor of the logits.
        softcap: their cap.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return [N, V] for hidden states [N, H]."""
        return head_logits(
            hidden.to(self.weight.dtype), self.weight, self.bias, self.scale, self.softcap
        )


def head_logits(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return ``softcap·tanh(scale·(hidden @ weight.T + bias) / softcap)`` [N, V].

    With ``out`` [N, V] the table is written there, without gradients.
    """
    if out is not None:
        torch.mm(hidden, weight.T, out=out)
        if bias is not None:
            out += bias
        if scale != 1.0:
            out *= scale
        if softcap is not None:
            out.div_(softcap).tanh_().mul_(softcap)
        return out
    logits = torch.nn.functional.linear(hidden, weight, bias)
    if scale != 1.0:
        logits = logits * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return logits


def head_of(model: Any) -> Head:
    """Return the head of an unwrapped causal language model (PEFT's wrapper included)."""
    module = model.get_output_embeddings()
    config = model.config.get_text_config()
    scale = 1.0
    if getattr(config, "logits_scaling", None):  # Granite divides
        scale = 1.0 / float(config.logits_scaling)
    elif getattr(config, "logit_scale", None):  # Cohere multiplies
        scale = float(config.logit_scale)
    return Head(
        module.weight,
        getattr(module, "bias", None),
        scale,
        getattr(config, "final_logit_softcapping", None),  # Gemma 2
    )


def last_hidden_states(model: Any, inputs: dict[str, Any], wrapped: Any = None) -> torch.Tensor:
    """Return [batch, sequence, hidden] as it enters the head.

    The decoder is called without the head. A wrapper (DDP, FSDP) has to see an ordinary forward
    pass, so it is called with ``logits_to_keep=1``: one position goes through the head, and the
    decoder's output is read by a forward hook.

    Args:
        model: not wrapped, or in place.
        inputs: of the forward pass.
        wrapped: the model in its wrapper, if it has one.
    """
    if wrapped is None:
        states: torch.Tensor = model.get_decoder()(**inputs, use_cache=False).last_hidden_state
        return states
    kept: list[torch.Tensor] = []

    def keep(module: torch.nn.Module, args: Any, output: Any) -> None:
        kept.append(output.last_hidden_state)

    handle = model.get_decoder().register_forward_hook(keep)
    try:
        wrapped(**inputs, use_cache=False, logits_to_keep=1)
    finally:
        handle.remove()
    return kept[0]
