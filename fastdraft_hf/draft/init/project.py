"""Embeddings and head of the target, projected; the layers are random."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastdraft_hf.draft.init import register_method
from fastdraft_hf.draft.init.base import Method, Request
from fastdraft_hf.draft.vocabulary_basis import project_vocabulary, vocabulary_basis

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@register_method
class Project(Method):
    """``project``: each token has the place the target gives it, as far as the width goes."""

    name = "project"

    def build(self, request: Request) -> tuple[PreTrainedModel, dict[str, Any]]:
        draft = request.empty_draft()
        target = request.load(request.target)
        basis = vocabulary_basis(target, request.config.hidden_size)
        project_vocabulary(target, draft, basis)
        return draft, {"explained_variance": round(basis.share, 4)}
