"""A draft whose head scores the most frequent tokens only (FR-Spec, Zhao et al. 2025, 2502.14856).

For a small draft the head is most of the work of a step. A token that the head does not score is
never drafted; the target still writes it, so the output stays the target's.

On disk a reduced draft is the ordinary checkpoint, whole, beside a file of token ids
(`FILE`). Stock ``from_pretrained`` reads the checkpoint and scores every token; `load_draft` and
the OpenVINO export read the ids as well and leave the other rows of the head out.

The ids stand in JSON: some engines read every ``*.safetensors`` of a folder as weights.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastdraft_hf._atomic import write_text
from fastdraft_hf._errors import FastDraftError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FILE = "reduced_vocabulary.json"


@dataclass(frozen=True)
class ReducedVocabulary:
    """Which tokens a head scores.

    Attributes:
        token_ids: [K] ids, ascending: column k of the logits is token ``token_ids[k]``, and of two
            equal logits the first is the one that the full head would take.
        facts: how it was made (coverage, acceptance), as stored.
    """

    token_ids: tuple[int, ...]
    facts: dict[str, Any] = field(default_factory=dict)


def choose_token_ids(
    counts: Mapping[int, int], always: Collection[int], size: int, vocabulary: int
) -> list[int]:
    """Return the ``size`` ids to score, ascending: those of ``always``, then the most frequent.

    Of equally frequent tokens, and of those never seen, the lower ids are taken: byte-pair
    vocabularies are in the order of their merges, the commonest first.

    Args:
        counts: how often each id occurs in the target's own text.
        always: ids that stay whatever their count: special and end tokens.
        size: K.
        vocabulary: V.

    Raises:
        FastDraftError: ``size`` is not between the number of ``always`` and the vocabulary.
    """
    if not len(always) < size < vocabulary:
        raise FastDraftError(
            f"draft_vocab_size: {size:,} must be more than the {len(always):,} special tokens, "
            f"which always stay, and below the vocabulary of {vocabulary:,}"
        )
    kept = set(always)
    by_count = sorted(range(vocabulary), key=lambda token: (-counts.get(token, 0), token))
    for token in by_count:
        if len(kept) == size:
            break
        kept.add(token)
    return sorted(kept)


def write_reduced_vocabulary(folder: Path, head: ReducedVocabulary) -> None:
    """Write the ids beside the checkpoint in ``folder``."""
    value = {"token_ids": list(head.token_ids), "facts": head.facts}
    write_text(folder / FILE, json.dumps(value, ensure_ascii=False) + "\n")


def read_reduced_vocabulary(folder: str | Path) -> ReducedVocabulary | None:
    """Return the ids that lie in a draft's folder; ``None`` when its head is whole.

    Raises:
        FastDraftError: the file is damaged.
    """
    path = Path(folder) / FILE
    if not path.is_file():
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        ids = tuple(value["token_ids"])
        facts = dict(value.get("facts") or {})
    except (ValueError, TypeError, KeyError, AttributeError):
        raise FastDraftError(
            f"{path}: no list of token ids; delete it to use the full head"
        ) from None
    whole = all(type(token) is int and token >= 0 for token in ids)
    if not ids or not whole or any(a >= b for a, b in itertools.pairwise(ids)):
        raise FastDraftError(f"{path}: token_ids must be ascending ids; delete it to use all")
    return ReducedVocabulary(ids, facts)


def check_token_ids(token_ids: Sequence[int], rows: int) -> None:
    """Raise `FastDraftError` unless every id, ascending, is one of a draft's ``rows``."""
    if token_ids[-1] >= rows:
        raise FastDraftError(
            f"{FILE}: token {token_ids[-1]} is none of the draft's {rows:,}; these ids belong to "
            "another vocabulary"
        )


def reduce_model(model: PreTrainedModel, token_ids: Sequence[int]) -> None:
    """Replace a model's head in place by the rows of ``token_ids``; its logits become [..., K].

    `fastdraft_hf.assisted_decoding` reads which column is which token from
    ``model.head_token_ids``. Nothing else does: a reduced model is a draft for our loop only, and
    saving it is refused, since its folder would be no checkpoint any more.

    Args:
        model: a causal language model, its embeddings tied or not; they stay whole.
        token_ids: ascending ids.

    Raises:
        FastDraftError: an id lies outside the head.
    """
    import torch

    head = model.get_output_embeddings()
    rows = head.weight.shape[0]
    check_token_ids(token_ids, rows)
    index = torch.tensor(list(token_ids), device=head.weight.device)
    bias = getattr(head, "bias", None)
    reduced = torch.nn.Linear(
        head.weight.shape[1],
        len(index),
        bias=bias is not None,
        device=head.weight.device,
        dtype=head.weight.dtype,
    )
    with torch.no_grad():
        reduced.weight.copy_(head.weight[index])
        if bias is not None:
            reduced.bias.copy_(bias[index])
    model.set_output_embeddings(reduced)
    model.head_token_ids = index
    vars(model)["save_pretrained"] = _refuse_to_save


def _refuse_to_save(*args: Any, **kwargs: Any) -> None:
    raise FastDraftError(
        f"this draft's head is reduced in memory; its folder holds the whole head and {FILE}, "
        "copy that instead of saving it"
    )


def whole_parameters(model: PreTrainedModel) -> int:
    """Return the parameters of a draft as its folder has them, whatever of its head is loaded."""
    if getattr(model, "head_token_ids", None) is None:
        return int(model.num_parameters())
    from fastdraft_hf.draft.sizes import count_parameters

    # The rows of a reduced vocabulary are in memory twice where embeddings are tied.
    return count_parameters(model.config)


def load_draft(folder: str | Path, **kwargs: Any) -> PreTrainedModel:
    """Load a draft for `fastdraft_hf.assisted_decoding`, with its reduced vocabulary if it has one.

    A folder without `FILE` loads as ``AutoModelForCausalLM.from_pretrained`` loads it. To use a
    reduced draft with stock assisted generation, load it with that: the folder is an ordinary
    checkpoint with a full head.

    Args:
        folder: the draft's folder.
        **kwargs: of ``from_pretrained``, such as ``dtype``.
    """
    from transformers import AutoModelForCausalLM

    kwargs = {"use_safetensors": True, "trust_remote_code": False, **kwargs}
    head = read_reduced_vocabulary(folder)
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, **kwargs)
    if head is not None:
        reduce_model(model, head.token_ids)
    return model
