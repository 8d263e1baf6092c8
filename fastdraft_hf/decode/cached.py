"""A model with its key-value cache: the decoding loop feeds tokens and takes some back.

Shapes: B rows, n tokens fed, V vocabulary.
"""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from transformers import Cache, PreTrainedModel

from fastdraft_hf.decode.patches import CACHE_NAME
from fastdraft_hf.decode.skinny import with_skinny_linears


def execution_device(model: Any) -> torch.device:
    """Return the device that a model's inputs belong on.

    Weights that accelerate offloads lie on the device ``meta`` between passes; their hook knows
    where the passes run.
    """
    device = torch.device(model.device)
    if device.type != "meta":
        return device
    hook = getattr(model, "_hf_hook", None)
    return torch.device(getattr(hook, "execution_device", None) or "cpu")


class CachedModel(ABC):
    """One model and its cache.

    Args:
        device: of the input tokens.
        token_ids: [V'] the token of each column of the logits, when the head has a reduced
            vocabulary; ``None`` when column i is token i.

    Attributes:
        slots: positions of the cache in use, of the row that uses most.
    """

    def __init__(self, device: torch.device, token_ids: torch.Tensor | None = None) -> None:
        self.device = device
        self.token_ids = token_ids
        self.slots = 0

    @abstractmethod
    def feed(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        valid: torch.Tensor | None,
        keep: int,
    ) -> torch.Tensor:
        """Run the model over new tokens and return the logits of the last ``keep``.

        Args:
            tokens: [B, n] ids.
            positions: [B, n] their positions.
            valid: [B, n], 0 for tokens that later ones must not see; ``None`` for all valid.
            keep: number of logits, counted from the end.

        Returns:
            [B, keep, V'] on the model's device, in the model's type.
        """

    @abstractmethod
    def rollback(self, fed: int, kept: Sequence[int]) -> None:
        """Take back the rejected ones of the last ``fed`` tokens of every row.

        Args:
            fed: number of tokens, counted from the end; all of them were valid.
            kept: for every row, how many of them stay, the first ones.
        """

    @abstractmethod
    def select(self, rows: Sequence[int]) -> None:
        """Keep only these rows of the batch."""


class TorchModel(CachedModel):
    """A transformers causal LM with a dynamic cache.

    All rows have the same number of slots, and accept different numbers of drafted tokens, so a
    slot may hold a rejected token for one row and a valid one for another. The slot stays, with
    attention_mask 0 where its token was rejected, and later tokens are fed with explicit
    position_ids, which count valid tokens only. When too many slots are masked, the cache is
    compacted.

    Args:
        cache: an empty cache, or one that holds the first tokens of the prompt.
        prompt_mask: [B, L] the prompt's attention mask, needed with a cache that is not empty.
    """

    # A cache is compacted when its slots exceed `waste_factor` times the longest row plus
    # `waste_slots`.
    waste_factor = 1.25
    waste_slots = 64

    def __init__(
        self,
        model: PreTrainedModel,
        cache: Cache,
        prompt_mask: torch.Tensor | None = None,
        token_ids: torch.Tensor | None = None,
    ) -> None:
        super().__init__(execution_device(model), token_ids)
        self.model: Any = with_skinny_linears(model)
        self.cache = cache
        self.slots = cache.get_seq_length()
        # [B, slots] of 0 and 1; None while every slot of every row is valid.
        self.mask: torch.Tensor | None = None
        self._valid: list[int] = []
        if self.slots and prompt_mask is not None:
            past = prompt_mask[:, : self.slots].bool()
            self._valid = past.sum(1).tolist()
            self.mask = None if past.all() else past
        # Newer releases cut sliding layers in `crop` only, after this call.
        self._records_past = hasattr(cache, "activate_past_recording")
        if self._records_past:
            cache.activate_past_recording()
        accepted = inspect.signature(model.forward).parameters
        self._takes_positions = "position_ids" in accepted
        self._takes_keep = "logits_to_keep" in accepted

    def feed(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        valid: torch.Tensor | None,
        keep: int,
    ) -> torch.Tensor:
        rows, width = tokens.shape
        if not self._valid:
            self._valid = [0] * rows
        if valid is None:
            self._valid = [v + width for v in self._valid]
        else:
            added = valid.sum(1).tolist()
            self._valid = [v + int(a) for v, a in zip(self._valid, added, strict=True)]
            self._need_mask(rows)
        if self.mask is not None:
            new = self.mask.new_ones(rows, width) if valid is None else valid.to(self.mask)
            self.mask = torch.cat([self.mask, new], 1)
        self.slots += width
        given: dict[str, Any] = {CACHE_NAME: self.cache}
        if self._takes_positions:
            given["position_ids"] = positions
        if self._takes_keep:
            given["logits_to_keep"] = keep
        output = self.model(
            input_ids=tokens,
            attention_mask=self.mask if self.mask is None else self.mask.long(),
            use_cache=True,
            return_dict=True,
            **given,
        )
        logits: torch.Tensor = output.logits
        return logits[:, -keep:]

    def rollback(self, fed: int, kept: Sequence[int]) -> None:
        if not fed:
            return
        left = max(kept)
        drop = fed - left
        # crop(0) empties the cache in transformers 5.5 and cuts sliding layers in 5.23.
        if drop or self._records_past:
            self.cache.crop(-drop)
        self.slots -= drop
        if self.mask is not None:
            self.mask = self.mask[:, : self.slots]
        if min(kept) < left:
            mask = self._need_mask(len(kept))
            counts = torch.tensor(kept, device=mask.device)[:, None]
            mask[:, self.slots - left :] &= torch.arange(left, device=mask.device) < counts
        self._valid = [v - fed + k for v, k in zip(self._valid, kept, strict=True)]
        if self.slots > self.waste_factor * max(self._valid) + self.waste_slots:
            self._compact()

    def _compact(self) -> None:
        """Drop masked slots until the longest row has none; shorter rows are padded on the left."""
        if self.mask is None:
            return
        longest = max(self._valid)
        # Valid slots last, in their order: a stable sort of the mask says where each row's are.
        order = self.mask.to(torch.uint8).sort(dim=1, stable=True).indices[:, -longest:]
        for layer in self.cache.layers:
            index = order[:, None, :, None].to(layer.keys.device)
            for name in ("keys", "values"):
                states = getattr(layer, name)
                wide = index.expand(-1, states.shape[1], -1, states.shape[3])
                setattr(layer, name, states.gather(2, wide))
        self.mask = self.mask.gather(1, order)
        self.slots = longest
        if min(self._valid) == longest:
            self.mask = None

    def select(self, rows: Sequence[int]) -> None:
        index = torch.tensor(rows, device=self.device)
        self.cache.batch_select_indices(index)
        if self.mask is not None:
            self.mask = self.mask[index]
        self._valid = [self._valid[r] for r in rows]

    def _need_mask(self, rows: int) -> torch.Tensor:
        if self.mask is None:
            self.mask = torch.ones(rows, self.slots, dtype=torch.bool, device=self.device)
        return self.mask
