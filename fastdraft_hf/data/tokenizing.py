"""From a source to token shards, as many tokens as are asked for, going on where it stopped."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastdraft_hf._errors import FastDraftError
from fastdraft_hf.data.documents import Document, DocumentReader, settled
from fastdraft_hf.data.encoding import (
    BATCH_CHARS,
    DocumentEncoder,
    available_processes,
    batches,
    encode_batches,
)
from fastdraft_hf.data.sources import Source
from fastdraft_hf.data.token_shards import ShardWriter, TokenShards

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# About half a minute's work of one core: what a kill can cost.
PART_TOKENS = 1 << 24


def tokenize_source(
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    key: dict[str, Any],
    wanted_tokens: int | None,
    overlaps: Callable[[str], bool],
    generated: Path | None = None,
    processes: int | None = None,
    part_tokens: int = PART_TOKENS,
    on_tokens: Callable[[int], None] = lambda count: None,
) -> TokenShards:
    """Return the shards of a source, with at least ``wanted_tokens`` or the whole source in them.

    Only what is missing is made; one process at a time works in a folder, and another waits.

    Args:
        source: what is read.
        tokenizer: the target's.
        folder: where the shards are, or go.
        key: what they are made of (`token_shards.shard_key`).
        wanted_tokens: stop reading when there are so many; ``None`` for the whole source.
        overlaps: whether a text overlaps held-out text.
        generated: folder of the generated sets.
        processes: that tokenise; by default one a core.
        part_tokens: tokens a part.
        on_tokens: called with the tokens that were added since the last call.

    Raises:
        FastDraftError: the folder was made with another tokenizer, of another text or settings, a
            file cannot be read, or the source gives no text.
    """
    from filelock import FileLock

    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{folder.name}.lock")):
        encoder = DocumentEncoder(tokenizer, overlaps)
        writer = ShardWriter(folder, key, encoder.dtype, part_tokens)
        on_tokens(writer.tokens)
        if not writer.manifest["complete"] and not _enough(writer.tokens, wanted_tokens):
            _extend(source, writer, encoder, wanted_tokens, generated, processes, on_tokens)
    shards = TokenShards.open(folder, key)
    if not shards.tokens:
        raise FastDraftError(
            f"source {source.kind} '{source.name}': it gave no text to train on "
            f"({_reasons(shards.manifest['dropped'])})"
        )
    return shards


def _enough(tokens: int, wanted: int | None) -> bool:
    return wanted is not None and tokens >= wanted


def _reasons(dropped: dict[str, int]) -> str:
    return ", ".join(f"{name}: {count}" for name, count in dropped.items()) or "no document"


def _extend(
    source: Source,
    writer: ShardWriter,
    encoder: DocumentEncoder,
    wanted: int | None,
    generated: Path | None,
    processes: int | None,
    on_tokens: Callable[[int], None],
) -> None:
    reader = DocumentReader(source, generated)
    reader.seek(writer.place)

    def tagged() -> Iterator[tuple[list[Document], dict[str, Any]]]:
        # A small budget is not worth a whole batch of text.
        chars = BATCH_CHARS if wanted is None else min(BATCH_CHARS, max(1 << 12, 2 * wanted))
        for batch in batches(reader, chars):
            yield batch, settled(reader.place)

    encoded = encode_batches(encoder, tagged(), processes or available_processes())
    complete = True
    first = not writer.place
    for part, place in encoded:
        if first:  # rows that were filtered before they became documents
            writer.drop(reader.dropped)
            first = False
        before = writer.tokens
        writer.add(part, place)
        on_tokens(writer.tokens - before)
        if _enough(writer.tokens, wanted):
            complete = False
            break
    if first:
        writer.drop(reader.dropped)
    encoded.close()  # type: ignore[attr-defined]  # it is a generator: its processes end here
    writer.commit(complete=complete)
