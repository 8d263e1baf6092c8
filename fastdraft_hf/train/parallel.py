"""Parallel drafting: train a draft to guess several tokens in one pass (PARD, arXiv 2504.18583).

The draft reads the text and γ − 1 mask tokens behind it. The last token of the text predicts the
next one, as always, and the j-th mask the token j places further on, of which everything in between
is unknown. One pass so drafts γ tokens. The checkpoint stays an ordinary one, which also drafts one
by one; ``pard_token`` of its config is the mask, as in vLLM.

In training every position of a text can be the last one read. Masks for all of them would make the
text γ times as long, so most are dropped (conditional drop): a position has its j-th mask with
probability `KEPT` ** j, and never without the ones before it.

Shapes: B rows, T tokens, E masks of the row that has most.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.nn.functional import pad

from fastdraft_hf._errors import FastDraftError
from fastdraft_hf.data.columns import IGNORED

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# The paper's best share.
KEPT = 0.7


class Masked(NamedTuple):
    """A batch with masks, and what they predict.

    Attributes:
        inputs: of the draft's forward pass: ``input_ids`` and ``position_ids`` [B, T + E], the
            text's first, and ``attention_mask`` [B, 1, T + E, T + E], true where a token sees one.
        rows: [N] the row of each mask.
        masks: [N] its place in ``input_ids``.
        columns: [N] the token of the text that it predicts.
    """

    inputs: dict[str, torch.Tensor]
    rows: torch.Tensor
    masks: torch.Tensor
    columns: torch.Tensor


def with_masks(
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    labels: torch.Tensor,
    *,
    mask_token: int,
    num_tokens: int,
    generator: torch.Generator,
) -> Masked:
    """Put up to ``num_tokens`` − 1 masks behind positions whose next tokens are labelled.

    Args:
        input_ids: [B, T], padded on the right.
        attention_mask: [B, T], or ``None`` when all of it counts.
        labels: [B, T], the label of a token at its own place.
        mask_token: the id of a mask.
        num_tokens: tokens of a block, γ.
        generator: decides which masks are dropped.
    """
    device, (batch, length) = input_ids.device, input_ids.shape
    # [B, T, γ]: the labels behind each position, as far as all before them carry loss.
    behind = pad(labels[:, 1:], (0, num_tokens), value=IGNORED)
    labelled = (behind.unfold(1, num_tokens, 1) != IGNORED).long().cumprod(-1).bool()
    chances = torch.rand(batch, length, 1, generator=generator).to(device)
    kept = chances < KEPT ** torch.arange(num_tokens, device=device)
    kept[..., 0] = False  # the text's own token predicts this one
    rows, last, steps = (labelled & kept).nonzero(as_tuple=True)
    counts = rows.bincount(minlength=batch)
    numbers = torch.arange(len(rows), device=device) - (counts.cumsum(0) - counts)[rows]
    most = int(counts.max())
    text = torch.arange(length, device=device).expand(batch, -1)
    # The last token that each one sees, and the number of masks from there. Padding sees a token
    # too: a row of the attention without any would not be a number.
    anchors = pad(text, (0, most))
    depths = torch.zeros_like(anchors)
    anchors[rows, length + numbers], depths[rows, length + numbers] = last, steps
    sees_text = text[:, None, :] <= anchors[:, :, None]
    if attention_mask is not None:
        sees_text &= attention_mask[:, None, :].bool()
    group, depth = anchors[:, length:], depths[:, length:]
    sees_masks = (
        (group[:, None, :] == anchors[:, :, None])
        & (depth[:, None, :] <= depths[:, :, None])
        & (depth[:, None, :] > 0)
    )
    inputs = {
        "input_ids": pad(input_ids, (0, most), value=mask_token),
        "position_ids": anchors + depths,
        "attention_mask": torch.cat([sees_text, sees_masks], 2)[:, None],
    }
    return Masked(inputs, rows, length + numbers, last + steps + 1)


def choose_mask(args: Any, model: Any, tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the mask of a draft that is to be trained with masks, noted in its config.

    Raises:
        FastDraftError: a setting cannot be combined with masks, or no token can be one.
    """
    if args.packing or args.padding_free:
        raise FastDraftError(
            "num_parallel_tokens: packed rows have no room for masks; set packing and padding_free "
            "to false"
        )
    kind = model.config._attn_implementation
    if kind != "sdpa":
        raise FastDraftError(
            f"num_parallel_tokens: needs attention that takes any mask; load the draft with "
            f"attn_implementation='sdpa' instead of '{kind}'"
        )
    if getattr(model.config, "pard_token", None) is None:
        rows = int(model.get_input_embeddings().weight.shape[0])
        model.config.pard_token = mask_token_of(tokenizer, rows)
    return int(model.config.pard_token)


def mask_token_of(tokenizer: PreTrainedTokenizerBase, rows: int) -> int:
    """Choose a draft's mask: a token that no text holds.

    The tokenizer's own mask; else the first row of the embedding that no token uses; else the last
    special token which ends, begins or pads nothing and which the chat template does not write.

    Args:
        rows: of the embedding.

    Raises:
        FastDraftError: every token may occur in a text.
    """
    mask = getattr(tokenizer, "mask_token_id", None)
    if mask is not None:
        return int(mask)
    if len(tokenizer) < rows:
        return len(tokenizer)
    template = str(tokenizer.chat_template or "")
    used = {tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token}
    for token, about in sorted(tokenizer.added_tokens_decoder.items(), reverse=True):
        name = about.content
        if about.special and name not in used and name not in template:
            return int(token)
    raise FastDraftError(
        "num_parallel_tokens: the vocabulary has no token that can stand for one to come; set "
        "pard_token in the draft's config.json to an id that the text does not use"
    )
