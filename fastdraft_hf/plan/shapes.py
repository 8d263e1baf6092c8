"""A model's parameters by what they cost: layers, head, embeddings; and the arithmetic of a token.

Counted on the meta device, so a model of any size costs no memory. FLOPs follow the usual counting:
a multiplication and an addition a weight and token forwards, twice that backwards (2N and 6N;
Kaplan et al. 2020, arXiv 2001.08361, section 2.1), with attention's products over the context added
and the embedding, which is only looked up, left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Shape:
    """What a model is made of.

    Attributes:
        parameters: all of them, a tied head once.
        layer_parameters: of the decoder layers.
        head_parameters: of the output head, also when it is tied.
        layers, width, inner: number of layers, hidden size, feed-forward size.
        query, key: widths of all query heads and of all key heads together.
        vocabulary: tokens the head scores.
    """

    parameters: int
    layer_parameters: int
    head_parameters: int
    layers: int
    width: int
    inner: int
    query: int
    key: int
    vocabulary: int

    @property
    def read_parameters(self) -> int:
        """Parameters that one decoding step reads: layers and head."""
        return self.layer_parameters + self.head_parameters

    def forward_flops(self, context: float, *, head: bool = True) -> float:
        """Return the FLOPs of one token forwards.

        Args:
            context: tokens it attends to, on average.
            head: whether its logits are made.
        """
        products = 2.0 * (self.layer_parameters + (self.head_parameters if head else 0))
        return products + self.attention_flops(context)

    def attention_flops(self, context: float) -> float:
        """Return the FLOPs of one token's scores and weighted sums, forwards, all layers."""
        return 4.0 * self.layers * self.query * context

    def train_flops(self, length: float) -> float:
        """Return the FLOPs of one token of a sequence of ``length``, forwards and backwards."""
        return 3.0 * self.forward_flops(length / 2)

    def cache_bytes(self, element: float = 2) -> float:
        """Return the bytes of the KV cache a token."""
        return 2.0 * self.layers * self.key * element

    def activation_bytes(self, tokens: float, element: float = 2) -> float:
        """Return the bytes kept for the backward pass: what each layer's products read."""
        each = 6 * self.width + 2 * self.query + 2 * self.key + 4 * self.inner
        # Per layer in the compute type; hidden states and one chunk of the head in float32.
        return tokens * (self.layers * each * element + 8 * self.width) + 128 * self.vocabulary * 12


def shape_of(config: Any) -> Shape:
    """Return the shape of a config's model, made on the meta device."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    own = config.get_text_config()
    head = model.get_output_embeddings().weight
    layers = sum(
        parameter.numel()
        for name, parameter in model.named_parameters()
        if ".layers." in name or ".h." in name
    )
    heads = own.num_attention_heads
    size = getattr(own, "head_dim", None) or own.hidden_size // heads
    return Shape(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        layer_parameters=layers,
        head_parameters=head.numel(),
        layers=own.num_hidden_layers,
        width=own.hidden_size,
        inner=own.intermediate_size,
        query=heads * size,
        key=(getattr(own, "num_key_value_heads", None) or heads) * size,
        vocabulary=head.shape[0],
    )
