"""Token shards: a source as token ids on disk, read memory-mapped and shared by runs.

A folder holds ``shards.json`` and numbered parts. A part is ``NNNNN.ids`` (the ids of whole
documents, one after the other, uint16 or uint32, little-endian, no header) and ``NNNNN.docs.npy``
(one row a document: its ids, the bytes of its text, 64 bits of its hash). The manifest lists the
parts with their checksums, what was left out and where the source was when the part was written; it
is replaced atomically after each part, so that a kill loses the part that was being written and
nothing else.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastdraft_hf._atomic import atomic_file, sha256_file, write_json
from fastdraft_hf._errors import FastDraftError
from fastdraft_hf.data.encoding import DUPLICATE, Encoded, document_end
from fastdraft_hf.data.sources import Source

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

MANIFEST = "shards.json"
FORMAT = 1
_DOCUMENT = np.dtype([("ids", "<i8"), ("bytes", "<i8"), ("hash", "<u8")])


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return what changes when a text's ids could: the tokenizer's whole definition."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        from tokenizers import Tokenizer

        # Without truncation and padding, which are no part of what an id means.
        plain = Tokenizer.from_str(backend.to_str())
        plain.no_truncation()
        plain.no_padding()
        text = plain.to_str()
    else:
        text = json.dumps(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(text.encode()).hexdigest()


def shard_key(
    source: Source, tokenizer: PreTrainedTokenizerBase, held_out: dict[str, list[str]]
) -> dict[str, Any]:
    """Return what a folder of shards was made of; another run may read it if this is the same."""
    return {
        "format": FORMAT,
        "source": source.share_key(),
        "text": source.text_digest(),
        "tokenizer": tokenizer_digest(tokenizer),
        "document_end": document_end(tokenizer),
        "held_out": held_out,
    }


def shard_folder(root: Path, source: Source, key: dict[str, Any]) -> Path:
    """Return the folder of a source's shards: one name a key."""
    name = "".join(c if c.isalnum() else "-" for c in (source.name or source.kind)).strip("-")
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    return root / f"{name[-40:].strip('-').lower()}-{digest[:12]}"


@dataclass
class TokenShards:
    """A folder of shards, to read.

    Attributes:
        folder: where they are.
        manifest: what ``shards.json`` says.
    """

    folder: Path
    manifest: dict[str, Any]

    @classmethod
    def open(cls, folder: Path, key: dict[str, Any] | None = None) -> TokenShards:
        """Open a folder; with ``key``, only if it was made of that.

        Raises:
            FastDraftError: there are no shards, they were made by another tokenizer or of another
                text, or a part is missing or cut off.
        """
        path = folder / MANIFEST
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
            made = manifest["key"]
            names = [(p["ids"]["name"], p["ids"]["bytes"]) for p in manifest["parts"]]
            names += [(p["docs"]["name"], p["docs"]["bytes"]) for p in manifest["parts"]]
        except FileNotFoundError:
            raise FastDraftError(f"{folder} holds no token shards ({MANIFEST})") from None
        except (ValueError, KeyError, TypeError) as error:
            raise FastDraftError(f"{path} is no manifest of token shards ({error})") from error
        for field in key or {}:
            assert key is not None
            if made.get(field) != key[field]:
                raise FastDraftError(
                    f"{folder}: these token shards were made with another {field.replace('_', ' ')}"
                    f" ({_short(made.get(field))}, not {_short(key[field])}); name another folder "
                    "or delete this one"
                )
        for name, size in names:
            file = folder / name
            if not file.is_file() or file.stat().st_size != size:
                raise FastDraftError(f"{file}: missing or cut off; delete {folder} to make it anew")
        return cls(folder, manifest)

    def verify(self, on_bytes: Callable[[int], None] = lambda count: None) -> None:
        """Compare every file with its checksum.

        Raises:
            FastDraftError: naming the first file that differs.
        """
        for part in self.manifest["parts"]:
            for file in (part["ids"], part["docs"]):
                path = self.folder / file["name"]
                if sha256_file(path) != file["sha256"]:
                    raise FastDraftError(
                        f"{path}: its checksum is not that of the manifest; delete {self.folder} "
                        "to make it anew"
                    )
                on_bytes(file["bytes"])

    @property
    def tokens(self) -> int:
        return int(sum(part["tokens"] for part in self.manifest["parts"]))

    @property
    def files_bytes(self) -> int:
        """Bytes of all parts on disk."""
        parts = self.manifest["parts"]
        return int(sum(part[kind]["bytes"] for part in parts for kind in ("ids", "docs")))

    @property
    def complete(self) -> bool:
        """Whether the whole source is here."""
        return bool(self.manifest["complete"])

    def ids(self) -> list[NDArray[Any]]:
        """Return every part's ids, memory-mapped."""
        dtype = np.dtype(self.manifest["dtype"])
        # An empty part cannot be mapped and is never written.
        return [
            np.memmap(self.folder / part["ids"]["name"], dtype=dtype, mode="r")
            for part in self.manifest["parts"]
        ]

    def documents(self) -> NDArray[Any]:
        """Return a row a document: ``ids``, ``bytes``, ``hash``."""
        parts = [np.load(self.folder / p["docs"]["name"]) for p in self.manifest["parts"]]
        found: NDArray[Any] = np.concatenate(parts) if parts else np.empty(0, _DOCUMENT)
        return found

    def facts(self) -> dict[str, Any]:
        """Return what a summary says: tokens, bytes, documents, what was left out."""
        parts = self.manifest["parts"]
        size = sum(part["text_bytes"] for part in parts)
        dropped = dict(self.manifest["dropped"])
        return {
            "tokens_on_disk": self.tokens,
            "bytes": size,
            "bytes_per_token": round(size / max(1, self.tokens), 3),
            "documents": sum(part["documents"] for part in parts),
            "dropped": dropped,
            "whole_source": self.complete,
        }


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


class ShardWriter:
    """Appends documents to a folder of shards.

    Args:
        folder: made if missing; what it holds must be of ``key``.
        key: see `shard_key`.
        dtype: of the ids.
        part_tokens: a part is written when it has this many.
    """

    def __init__(
        self, folder: Path, key: dict[str, Any], dtype: np.dtype[Any], part_tokens: int
    ) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / MANIFEST).exists():
            self.manifest = TokenShards.open(folder, key).manifest
            if np.dtype(self.manifest["dtype"]) != dtype:
                raise FastDraftError(f"{folder}: {self.manifest['dtype']} ids, not {dtype}")
        else:
            self.manifest = {
                "key": key,
                "dtype": str(dtype),
                "complete": False,
                "place": {},
                "dropped": {},
                "parts": [],
            }
        self._dtype, self._part_tokens = dtype, part_tokens
        written = TokenShards(folder, self.manifest).documents()["hash"]
        self._seen: NDArray[np.uint64] = np.sort(written)
        self._fresh: set[int] = set()
        self._pending: list[Encoded] = []
        self._pending_tokens = 0
        self._dropped: dict[str, int] = dict(self.manifest["dropped"])

    @property
    def place(self) -> dict[str, Any]:
        """Where the source was after the last written part."""
        return dict(self.manifest["place"])

    @property
    def tokens(self) -> int:
        return int(sum(p["tokens"] for p in self.manifest["parts"])) + self._pending_tokens

    def drop(self, counts: dict[str, int]) -> None:
        """Count documents that were left out, by reason."""
        for reason, count in counts.items():
            self._dropped[reason] = self._dropped.get(reason, 0) + count

    def add(self, encoded: Encoded, place: dict[str, Any]) -> None:
        """Take documents; ``place`` is where the source is after them."""
        keep = np.ones(len(encoded.lengths), bool)
        if len(self._seen):
            at = np.searchsorted(self._seen, encoded.hashes).clip(max=len(self._seen) - 1)
            keep &= self._seen[at] != encoded.hashes
        for index, number in enumerate(encoded.hashes.tolist()):
            if number in self._fresh:
                keep[index] = False
            self._fresh.add(number)
        encoded = encoded.select(keep, DUPLICATE)
        self.drop(encoded.dropped)
        self._pending.append(encoded)
        self._pending_tokens += len(encoded.ids)
        self._place = place
        if self._pending_tokens >= self._part_tokens:
            self.commit()

    def commit(self, complete: bool = False) -> None:
        """Write what is pending as a part, and the manifest."""
        manifest = {**self.manifest, "complete": complete, "dropped": dict(self._dropped)}
        if self._pending:
            manifest["place"] = self._place
        if self._pending_tokens:
            manifest["parts"] = [*manifest["parts"], self._write_part(len(manifest["parts"]))]
        write_json(self.folder / MANIFEST, manifest)
        self.manifest = manifest
        self._pending, self._pending_tokens = [], 0
        self._seen = np.sort(np.concatenate([self._seen, np.fromiter(self._fresh, np.uint64)]))
        self._fresh = set()

    def _write_part(self, number: int) -> dict[str, Any]:
        documents = np.empty(sum(len(e.lengths) for e in self._pending), _DOCUMENT)
        for field, name in (("ids", "lengths"), ("bytes", "sizes"), ("hash", "hashes")):
            documents[field] = np.concatenate([getattr(e, name) for e in self._pending])
        files = {"ids": self.folder / f"{number:05d}.ids"}
        files["docs"] = self.folder / f"{number:05d}.docs.npy"
        with atomic_file(files["ids"]) as temporary, temporary.open("wb") as stream:
            for encoded in self._pending:
                encoded.ids.astype(self._dtype.newbyteorder("<"), copy=False).tofile(stream)
        with atomic_file(files["docs"]) as temporary, temporary.open("wb") as stream:
            np.save(stream, documents)
        listed = {
            kind: {
                "name": path.name,
                "bytes": path.stat().st_size,
                "sha256": sha256_file(path),
            }
            for kind, path in files.items()
        }
        return {
            **listed,
            "tokens": self._pending_tokens,
            "documents": len(documents),
            "text_bytes": int(documents["bytes"].sum()),
        }
