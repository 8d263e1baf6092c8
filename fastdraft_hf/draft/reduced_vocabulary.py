"""Drafts whose head scores only the most frequent tokens (FR-Spec, Zhao et al. 2025, 2502.14856).

A token that the head does not score is never drafted; the target still produces it. On disk a
reduced draft is an ordinary checkpoint with the full head, and a file of token ids (`FILE`).
``from_pretrained`` scores every token; `load_draft` and the OpenVINO export read the ids and leave
out the other rows of the head. The file is JSON, because some engines load every ``*.safetensors``
file of a folder as weights.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastdraft_hf._atomic import read_json, write_text
from fastdraft_hf._errors import FastDraftError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FILE = "reduced_vocabulary.json"


def rank_tokens(counts: Mapping[int, int], always: Collection[int], vocabulary: int) -> list[int]:
    """Return the ids of a vocabulary: those of ``always``, then the most frequent ones.

    Among equally frequent tokens, the lower ids come first: byte-pair vocabularies are in the order
    of their merges, the most common first.
    """
    return sorted(range(vocabulary), key=lambda t: (t not in always, -counts.get(t, 0), t))


def check_size(size: int, always: Collection[int], vocabulary: int) -> None:
    """Raise `FastDraftError` if a vocabulary cannot be reduced to ``size``."""
    if not len(always) < size < vocabulary:
        raise FastDraftError(
            f"draft_vocab_size: {size:,} must be more than the {len(always):,} end tokens, which "
            f"always stay, and below the vocabulary of {vocabulary:,}"
        )


def write_reduced_vocabulary(folder: Path, token_ids: Sequence[int]) -> None:
    """Write the ids to the folder of the checkpoint."""
    write_text(folder / FILE, json.dumps({"token_ids": list(token_ids)}) + "\n")


def read_reduced_vocabulary(folder: str | Path) -> list[int] | None:
    """Return the tokens that the head of a draft's folder scores, None where the head is full.

    They are [K] ascending ids; column k of the logits is token ``token_ids[k]``. Of two equal
    logits the first is the one that the full head would choose.

    Raises:
        FastDraftError: the file is damaged.
    """
    path = Path(folder) / FILE
    if not path.is_file():
        return None
    try:
        ids = list(read_json(path)["token_ids"])
    except (ValueError, TypeError, KeyError):
        ids = []
    integers = all(type(token) is int for token in ids)
    if not ids or not integers or ids[0] < 0 or any(a >= b for a, b in itertools.pairwise(ids)):
        raise FastDraftError(
            f"{path}: token_ids must be ascending ids; delete the file to use the full head"
        )
    return ids


def check_token_ids(token_ids: Sequence[int], rows: int) -> None:
    """Raise `FastDraftError` unless all ids (ascending) are below a draft's ``rows``."""
    if token_ids[-1] >= rows:
        raise FastDraftError(
            f"{FILE}: token {token_ids[-1]} is not among the draft's {rows:,} rows; the ids belong "
            "to another vocabulary"
        )


def reduce_model(model: PreTrainedModel, token_ids: Sequence[int]) -> None:
    """Reduce a model's head in place to the rows of ``token_ids``; its logits become [..., K].

    `fastdraft_hf.assisted_decoding` reads the token of each column from ``model.head_token_ids``.
    Nothing else does, so the model is a draft for that loop only. It cannot be saved: its folder
    would not be a checkpoint. The embeddings keep every row, tied or not.

    Raises:
        FastDraftError: an id is outside the head.
    """
    import torch

    head = model.get_output_embeddings()
    check_token_ids(token_ids, head.weight.shape[0])
    index = torch.tensor(list(token_ids), device=head.weight.device)
    bias = getattr(head, "bias", None)
    reduced = torch.nn.Linear(head.weight.shape[1], len(index), bias is not None).to(head.weight)
    with torch.no_grad():
        reduced.weight.copy_(head.weight[index])
        if bias is not None:
            reduced.bias.copy_(bias[index])
    model.set_output_embeddings(reduced)
    model.head_token_ids = index
    vars(model)["save_pretrained"] = _refuse_to_save


def _refuse_to_save(*args: Any, **kwargs: Any) -> None:
    raise FastDraftError(
        f"this draft's head is reduced in memory; its folder has the full head and {FILE}, so copy "
        "that instead of saving the model"
    )


def load_draft(folder: str | Path, **kwargs: Any) -> PreTrainedModel:
    """Load a draft for `fastdraft_hf.assisted_decoding`, with its reduced vocabulary if it has one.

    For transformers' own assisted generation load it with ``AutoModelForCausalLM``, which reads the
    full head. The keyword arguments are those of ``from_pretrained``, such as ``dtype``.
    """
    from transformers import AutoModelForCausalLM

    kwargs = {"use_safetensors": True, "trust_remote_code": False, **kwargs}
    token_ids = read_reduced_vocabulary(folder)
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, **kwargs)
    if token_ids is not None:
        reduce_model(model, token_ids)
    return model
