"""A donor with another tokenizer: its layers, and for each token of the target an embedding."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastdraft_hf._errors import FastDraftError
from fastdraft_hf.draft.init import register_method
from fastdraft_hf.draft.init.base import Method, Request
from fastdraft_hf.draft.init.prune import prune, resize_rows
from fastdraft_hf.draft.token_spelling import TokenMatches, match_tokens

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


@register_method
class Transplant(Method):
    """``transplant``: a token is the mean of the pieces its text has under the donor's tokenizer.

    The layers are then cut as `prune` cuts them.
    """

    name = "transplant"

    def build(self, request: Request) -> tuple[PreTrainedModel, dict[str, Any]]:
        from transformers import AutoTokenizer

        from fastdraft_hf.target.resolve import resolve_target

        assert request.design.donor is not None
        donor = resolve_target(request.design.donor)

        def tokenizer(folder: Path, key: str) -> Any:
            try:
                return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
            except (OSError, ValueError, ImportError) as error:
                raise FastDraftError(f"{key}: {folder} has no tokenizer to go by") from error

        ours, theirs = tokenizer(request.target, "target"), tokenizer(donor.path, "design.donor")
        matches = match_tokens(ours, theirs, request.design.token_map)
        model = request.load(donor.path)
        replace_vocabulary(model, matches, request.config.vocab_size)
        draft, facts = prune(request, model, donor.path)
        return draft, {
            "donor": donor.name,
            "donor_revision": donor.revision,
            "tokens": matches.counts(),
            "special_tokens": matches.special,
            **facts,
        }


def replace_vocabulary(model: PreTrainedModel, matches: TokenMatches, rows: int) -> None:
    """Give ``model`` the vocabulary that ``matches`` describes, in ``rows`` rows.

    Tokens without pieces, and rows without a token, get the mean of the donor's rows.
    """
    import torch

    with torch.no_grad():
        tables = [model.get_input_embeddings().weight, model.get_output_embeddings().weight]
        if tables[0] is tables[1]:
            tables = tables[:1]
        new = [_mapped(table.float(), matches, rows) for table in tables]
    resize_rows(model, rows)
    with torch.no_grad():
        model.get_input_embeddings().weight.copy_(new[0])
        if len(new) == 2:
            model.get_output_embeddings().weight.copy_(new[1])


def _mapped(table: torch.Tensor, matches: TokenMatches, rows: int) -> torch.Tensor:
    import torch

    new = table.mean(0).repeat(rows, 1)
    # A tokenizer may name more than the model has rows for (Gemma's mark of an image).
    known = [(i, p) for i, found in matches.pieces.items() for p in found if p < len(table)]
    owners = [i for i, _ in known if i < rows]
    pieces = [p for i, p in known if i < rows]
    if pieces:
        owner, sums = torch.tensor(owners), torch.zeros_like(new)
        sums.index_add_(0, owner, table[torch.tensor(pieces)])
        count = torch.bincount(owner, minlength=rows)[:, None]
        new = torch.where(count > 0, sums / count.clamp_min(1), new)
    return new
