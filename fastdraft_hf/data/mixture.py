"""A stage's mixture: how much of which source, what is held out, and what a summary says of it.

It is decided once and written down (``mixture.json``), so that a resumed run reads the same.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastdraft_hf._atomic import write_json
from fastdraft_hf._errors import FastDraftError
from fastdraft_hf.data import installed
from fastdraft_hf.data.blocks import Share, blocks_dataset, first_blocks, without_documents
from fastdraft_hf.data.sources import Source, summary_keys, token_shares
from fastdraft_hf.data.token_shards import TokenShards, shard_folder, shard_key
from fastdraft_hf.data.tokenizing import tokenize_source

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

MIXTURE = "mixture.json"


def tokenize_sources(
    sources: Sequence[Source],
    tokenizer: PreTrainedTokenizerBase,
    *,
    own: Path,
    shared: Path | None,
    generated: Path,
    overlaps: Callable[[str], bool],
    held_out: dict[str, list[str]],
    wanted_tokens: Sequence[int | None],
    processes: int | None = None,
    on_tokens: Callable[[int], None] = lambda count: None,
) -> list[TokenShards]:
    """Return shards of every source, made where there are none yet or too few.

    Args:
        sources: what is read.
        tokenizer: the target's.
        own: folder for shards that are nobody else's (of generated sets always).
        shared: folder of shards that several runs share, if any.
        generated: folder of the generated sets.
        overlaps: whether a text overlaps held-out text.
        held_out: what ``overlaps`` was made of, part of the shards' key.
        wanted_tokens: by source; ``None`` for all of it.
        processes: that tokenise; by default one a core.
        on_tokens: called with tokens that were added since the last call.
    """
    found = []
    for source, wanted in zip(sources, wanted_tokens, strict=True):
        key = shard_key(source, tokenizer, held_out)
        root = own if shared is None or source.kind == "generated" else shared
        found.append(
            tokenize_source(
                source,
                tokenizer,
                shard_folder(root, source, key),
                key=key,
                wanted_tokens=wanted,
                overlaps=overlaps,
                generated=generated,
                processes=processes,
                on_tokens=on_tokens,
            )
        )
    return found


def shared_tokens(config: Any) -> Path | None:
    """Return the folder of shared token shards that a training section names, if any."""
    return None if config.tokens_dir is None else Path(config.tokens_dir).expanduser().resolve()


def summary_lines(summary: dict[str, Any]) -> list[str]:
    """Return a line a source for people: tokens, bytes per token, documents, what was dropped."""
    lines = []
    for key, facts in summary.items():
        parts = [f"{facts[k]:,} {what}" for k, what in _NAMES.items() if facts.get(k) is not None]
        if facts.get("dropped"):
            dropped = ", ".join(f"{n:,} {why}" for why, n in facts["dropped"].items())
            parts.append(f"dropped: {dropped}")
        if not set(facts) & set(_NAMES):
            parts = [f"{value:,} {name}" for name, value in facts.items()]
        lines.append(f"{key}: {'; '.join(parts)}")
    return lines


_NAMES = {
    "tokens": "tokens to train on",
    "tokens_on_disk": "tokens at hand",
    "passes": "passes",
    "documents": "documents",
    "documents_estimated": "documents (estimated)",
    "bytes": "bytes of text",
    "bytes_per_token": "bytes a token",
    "completion_tokens": "completion tokens",
}


def wanted_tokens(
    sources: Sequence[Source], blocks: int, eval_blocks: int, length: int
) -> list[int]:
    """Return how many tokens every source has to give, for training and held out."""
    weights = [source.weight for source in sources]
    train, held = token_shares(weights, blocks), token_shares(weights, eval_blocks)
    # Two more: what is cut off at the held-out slice's end, and at the last block's.
    return [(n + m + 2) * length for n, m in zip(train, held, strict=True)]


def plan_mixture(
    sources: Sequence[Source],
    shards: Sequence[TokenShards],
    *,
    blocks: int,
    eval_blocks: int,
    length: int,
    seed: int,
) -> tuple[dict[str, Any], list[list[int]], dict[str, Any]]:
    """Decide the mixture.

    The first ids of every source are held out, at most a fifth of it, in whole blocks; a document
    that has a part there is not trained on in any other source either.

    Returns:
        what `open_mixture` takes; the held-out blocks; and a summary by source.
    """
    weights = [source.weight for source in sources]
    train = token_shares(weights, blocks)
    held = [
        min(count, s.tokens // length // 5)
        for count, s in zip(token_shares(weights, eval_blocks), shards, strict=True)
    ]
    eval_set: list[list[int]] = []
    out: list[Any] = []
    documents = [s.documents() for s in shards]
    for s, count, rows in zip(shards, held, documents, strict=True):
        eval_set += first_blocks(s, length, count)
        starts = np.cumsum(rows["ids"]) - rows["ids"]
        out.append(rows["hash"][starts < count * length])
    hashes = np.concatenate(out)
    plan: list[dict[str, Any]] = []
    summary: dict[str, Any] = {}
    for i, (key, source) in enumerate(zip(summary_keys(sources), sources, strict=True)):
        rows = documents[i]
        others = np.setdiff1d(hashes, out[i])
        ranges = without_documents(rows["ids"], rows["hash"], others, held[i] * length)
        available = sum(end - start for start, end in ranges) // length
        if train[i] and available < 1:
            raise FastDraftError(
                f"source {source.kind} '{source.name}': its {shards[i].tokens:,} tokens give no "
                f"block of {length} to train on; lower max_length or leave the source out"
            )
        share = Share(ranges, train[i])
        plan.append({"folder": str(shards[i].folder), "ranges": ranges, "blocks": train[i]})
        summary[key] = {
            "tokens": train[i] * length,
            "passes": share.passes(length) if train[i] else 0,
            "held_out_tokens": held[i] * length,
            **shards[i].facts(),
        }
        if source.kind in ("packages", "package_docs"):
            kept = installed.licenses(source.name)
            summary[key] |= {
                "licenses": kept,
                "packages_left_out_by_license": installed.packages(source.name)[1],
            }
    return {"length": length, "seed": seed, "sources": plan}, eval_set, summary


def write_mixture(folder: Path, plan: dict[str, Any]) -> None:
    """Write a plan; folders of shards beside or below are named relative to it."""
    sources = []
    for entry in plan["sources"]:
        path = Path(entry["folder"])
        if path.is_relative_to(folder.parent):
            entry = {**entry, "folder": str(Path("..") / path.relative_to(folder.parent))}
        sources.append(entry)
    write_json(folder / MIXTURE, {**plan, "sources": sources})


def open_training_set(folder: Path) -> Dataset:
    """Open what a stage prepared in a folder: a mixture of token shards, or the set ``train``."""
    if (folder / MIXTURE).exists():
        return open_mixture(folder)
    import datasets

    return datasets.load_from_disk(str(folder / "train"))


def open_mixture(folder: Path) -> Dataset:
    """Open the training blocks of a plan.

    Raises:
        FastDraftError: shards are missing or cut off.
    """
    plan = json.loads((folder / MIXTURE).read_text(encoding="utf-8"))
    sources = [
        (
            TokenShards.open(folder / entry["folder"]),
            Share([(int(a), int(b)) for a, b in entry["ranges"]], int(entry["blocks"])),
        )
        for entry in plan["sources"]
        if entry["blocks"]
    ]
    return blocks_dataset(sources, int(plan["length"]), int(plan["seed"]))
