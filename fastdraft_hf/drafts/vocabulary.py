"""Whether two models may draft for one another: every id must mean the same token."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fastdraft_hf._errors import FastDraftError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def check_same_vocabulary(
    target: PreTrainedTokenizerBase, draft: PreTrainedTokenizerBase, draft_name: str | Path
) -> None:
    """Raise unless both tokenizers map the same ids to the same tokens and stop alike.

    Maps are compared, not lengths: two vocabularies of one length can differ, and two of
    different lengths can agree on every id that is used.

    Raises:
        FastDraftError: naming the first ids that differ.
    """
    ours, theirs = target.get_vocab(), draft.get_vocab()
    if ours != theirs:
        differing = sorted(t for t in ours.keys() | theirs.keys() if ours.get(t) != theirs.get(t))
        shown = ", ".join(
            f"{t!r}: {ours.get(t, 'none')} in the target, {theirs.get(t, 'none')} in the draft"
            for t in differing[:3]
        )
        raise FastDraftError(
            f"{draft_name}: its vocabulary is not the target's ({len(differing)} tokens differ; "
            f"{shown}). A draft must use the target's own tokenizer."
        )
    if target.eos_token_id != draft.eos_token_id:
        raise FastDraftError(
            f"{draft_name}: it ends on token {draft.eos_token_id}, the target on "
            f"{target.eos_token_id}; copy the target's tokenizer into the draft's folder"
        )
