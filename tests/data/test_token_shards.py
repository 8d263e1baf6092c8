"""Token shards: what was written is read, by runs that may read it, whatever was killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastdraft_hf._errors import FastDraftError
from fastdraft_hf.data.encoding import Encoded, document_end
from fastdraft_hf.data.sources import Source
from fastdraft_hf.data.token_shards import (
    MANIFEST,
    ShardWriter,
    TokenShards,
    shard_folder,
    shard_key,
    tokenizer_digest,
)
from fastdraft_hf.data.tokenizing import tokenize_source

KEY = {"made": "of this"}


def never(text: str) -> bool:
    return False


def encoded(documents: list[list[int]], dtype: Any, first_hash: int = 0) -> Encoded:
    return Encoded(
        np.array([i for d in documents for i in d], dtype),
        np.array([len(d) for d in documents], np.int64),
        np.arange(first_hash, first_hash + len(documents), dtype=np.uint64),
        np.array([3 * len(d) for d in documents], np.int64),
    )


@given(
    batches=st.lists(
        st.lists(st.lists(st.integers(0, 2**16 - 1), min_size=1, max_size=9), max_size=5),
        min_size=1,
        max_size=6,
    ),
    wide=st.booleans(),
    part_tokens=st.integers(1, 30),
)
def test_shards_give_back_every_document(
    tmp_path_factory: pytest.TempPathFactory,
    batches: list[list[list[int]]],
    wide: bool,
    part_tokens: int,
) -> None:
    folder = tmp_path_factory.mktemp("shards") / "s"
    dtype = np.dtype(np.uint32 if wide else np.uint16)
    if wide:
        batches = [[[i * 65_537 for i in d] for d in batch] for batch in batches]
    first = 0
    for number, batch in enumerate(batches):
        # Opened anew every time: what is pending is written, and appended to.
        writer = ShardWriter(folder, KEY, dtype, part_tokens)
        assert writer.place == ({"at": number - 1} if number else {})
        writer.add(encoded(batch, dtype, first), {"at": number})
        writer.commit(complete=number == len(batches) - 1)
        first += len(batch)
    shards = TokenShards.open(folder, KEY)
    shards.verify()
    wanted = [d for batch in batches for d in batch]
    ids = np.concatenate([np.empty(0, dtype), *shards.ids()]).tolist()
    assert ids == [i for d in wanted for i in d]
    assert all(part.dtype == dtype and isinstance(part, np.memmap) for part in shards.ids())
    rows = shards.documents()
    assert rows["ids"].tolist() == [len(d) for d in wanted]
    assert rows["hash"].tolist() == list(range(len(wanted)))
    assert shards.tokens == len(ids)
    facts = shards.facts()
    assert (facts["documents"], facts["bytes"]) == (len(wanted), 3 * len(ids))
    assert shards.complete


def test_a_document_that_was_there_is_left_out(tmp_path: Path) -> None:
    dtype = np.dtype(np.uint16)
    writer = ShardWriter(tmp_path / "s", KEY, dtype, 4)
    twice = encoded([[1, 2], [3], [4, 5, 6]], dtype)
    twice.hashes[:] = [7, 8, 7]
    writer.add(twice, {})
    writer.commit()
    again = ShardWriter(tmp_path / "s", KEY, dtype, 4)
    again.add(encoded([[9]], dtype, 8), {})
    again.add(encoded([[10]], dtype, 9), {})
    again.commit(complete=True)
    shards = TokenShards.open(tmp_path / "s")
    assert np.concatenate(shards.ids()).tolist() == [1, 2, 3, 10]
    assert shards.facts()["dropped"] == {"duplicate": 2}


@pytest.fixture
def source(tmp_path: Path) -> Source:
    path = tmp_path / "text.jsonl"
    lines = [json.dumps({"text": f"the cat {n} and the hat " * (1 + n % 9)}) for n in range(150)]
    path.write_text("\n".join(lines), encoding="utf-8")
    return Source(kind="files", name=str(path))


def tokenize(
    source: Source, tokenizer: Any, root: Path, wanted: int | None = None, **changes: Any
) -> TokenShards:
    key = shard_key(source, tokenizer, {})
    settings = {"key": key, "wanted_tokens": wanted, "overlaps": never, "processes": 1}
    folder = shard_folder(root, source, key)
    return tokenize_source(source, tokenizer, folder, **{**settings, **changes})


def content(shards: TokenShards) -> list[int]:
    return [int(i) for i in np.concatenate(shards.ids())]


def test_a_source_is_tokenised_once(source: Source, tiny_tokenizer: Any, tmp_path: Path) -> None:
    asked: list[str] = []

    def overlaps(text: str) -> bool:
        asked.append(text)
        return False

    first = tokenize(source, tiny_tokenizer, tmp_path / "t", overlaps=overlaps)
    assert len(asked) == 150
    again = tokenize(source, tiny_tokenizer, tmp_path / "t", overlaps=overlaps)
    assert len(asked) == 150
    assert content(first) == content(again)
    ids, end = content(first), document_end(tiny_tokenizer)
    assert ids.count(end) == 150
    ends = np.cumsum(first.documents()["ids"]) - 1
    assert [ids[i] for i in ends] == [end] * 150


def test_more_is_appended_when_more_is_asked_for(
    source: Source, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    whole = content(tokenize(source, tiny_tokenizer, tmp_path / "whole"))
    few = tokenize(source, tiny_tokenizer, tmp_path / "t", 100)
    assert 100 <= few.tokens < len(whole)
    assert not few.complete
    assert content(few) == whole[: few.tokens]
    more = tokenize(source, tiny_tokenizer, tmp_path / "t", len(whole) // 2)
    assert few.tokens < more.tokens < len(whole)
    assert content(more) == whole[: more.tokens]
    assert content(tokenize(source, tiny_tokenizer, tmp_path / "t")) == whole


def test_another_tokenizer_or_text_has_a_folder_of_its_own(
    source: Source, tiny_tokenizer: Any, target_tokenizer: Any, tmp_path: Path
) -> None:
    key = shard_key(source, tiny_tokenizer, {})
    one = shard_folder(tmp_path, source, key)
    assert shard_folder(tmp_path, source, shard_key(source, target_tokenizer, {})) != one
    assert shard_folder(tmp_path, source, shard_key(source, tiny_tokenizer, {"a": ["b"]})) != one
    heavier = Source(**{**vars(source), "weight": 3.0})
    assert shard_folder(tmp_path, heavier, shard_key(heavier, tiny_tokenizer, {})) == one
    Path(source.name).write_text('{"text": "other"}')
    assert shard_folder(tmp_path, source, shard_key(source, tiny_tokenizer, {})) != one


def test_the_digest_does_not_follow_truncation(tiny_tokenizer: Any, tmp_path: Path) -> None:
    before = tokenizer_digest(tiny_tokenizer)
    tiny_tokenizer.save_pretrained(tmp_path)
    loaded = type(tiny_tokenizer).from_pretrained(tmp_path)
    assert tokenizer_digest(loaded) == before
    loaded("the cat", truncation=True, max_length=1)
    assert tokenizer_digest(loaded) == before


def test_shards_of_another_tokenizer_are_refused(
    source: Source, tiny_tokenizer: Any, target_tokenizer: Any, tmp_path: Path
) -> None:
    folder = tokenize(source, tiny_tokenizer, tmp_path).folder
    with pytest.raises(FastDraftError, match="made with another tokenizer"):
        TokenShards.open(folder, shard_key(source, target_tokenizer, {}))
    with pytest.raises(FastDraftError, match="made with another held out"):
        TokenShards.open(folder, shard_key(source, tiny_tokenizer, {"a": ["b"]}))
    key = shard_key(source, target_tokenizer, {})
    with pytest.raises(FastDraftError, match="made with another tokenizer"):
        tokenize_source(
            source, target_tokenizer, folder, key=key, wanted_tokens=None, overlaps=never
        )


def test_damage_is_named(source: Source, tiny_tokenizer: Any, tmp_path: Path) -> None:
    shards = tokenize(source, tiny_tokenizer, tmp_path)
    path = shards.folder / "00000.ids"
    raw = path.read_bytes()
    path.write_bytes(raw[:-2])
    with pytest.raises(FastDraftError, match=r"00000\.ids: missing or cut off"):
        TokenShards.open(shards.folder)
    path.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    with pytest.raises(FastDraftError, match=r"00000\.ids: its checksum is not that"):
        TokenShards.open(shards.folder).verify()
    path.write_bytes(raw)
    TokenShards.open(shards.folder).verify()
    (shards.folder / MANIFEST).write_text("[]")
    with pytest.raises(FastDraftError, match="is no manifest of token shards"):
        TokenShards.open(shards.folder)
    with pytest.raises(FastDraftError, match="holds no token shards"):
        TokenShards.open(tmp_path)


def test_a_source_without_text_says_why(tiny_tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("  \n")
    (tmp_path / "b.txt").write_text("the secret")
    with pytest.raises(FastDraftError, match=r"gave no text .*empty: 1.*overlaps held-out text: 1"):
        tokenize(
            Source(kind="files", name=str(tmp_path / "*.txt")),
            tiny_tokenizer,
            tmp_path / "t",
            overlaps=lambda text: "secret" in text,
        )


# Forks a process that tokenizes for every line of its input, and says when one has begun and how
# it ended: what takes seconds is to import, and a killed process is the same without it.
KILLED = """
import os, sys, time
from pathlib import Path
from transformers import AutoTokenizer
from fastdraft_hf.data import encoding, tokenizing
from fastdraft_hf.data.sources import Source
from fastdraft_hf.data.token_shards import shard_folder, shard_key
source = Source(kind="files", name=sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[2])
tokenizing.BATCH_CHARS = 400
key = shard_key(source, tokenizer, {})
def slowly(text):
    time.sleep(0.002)
    return False
for _ in sys.stdin:
    child = os.fork()
    if child:
        print("begins", child, flush=True)
        print("ended", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    else:
        tokenizing.tokenize_source(
            source, tokenizer, shard_folder(Path(sys.argv[3]), source, key), key=key,
            wanted_tokens=None, overlaps=slowly, processes=1, part_tokens=300,
        )
        os._exit(0)
"""


def test_killed_at_any_moment_the_next_run_finishes(
    source: Source, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    tiny_tokenizer.save_pretrained(tmp_path / "tokenizer")
    whole = tokenize(source, tiny_tokenizer, tmp_path / "whole")
    root, kills, parts = tmp_path / "killed", 0, [0]
    command = [sys.executable, "-c", KILLED, source.name, str(tmp_path / "tokenizer"), str(root)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for after in (0.05, 0.12, 0.2):
            process.stdin.write("go\n")
            process.stdin.flush()
            begins, child = process.stdout.readline().split()
            assert begins == "begins"
            time.sleep(after)
            os.kill(int(child), signal.SIGKILL)  # until it is waited for, its number is its own
            kills += process.stdout.readline() == f"ended {-signal.SIGKILL}\n"
            manifests = list(root.glob(f"*/{MANIFEST}"))
            if manifests:
                shards = TokenShards.open(manifests[0].parent)
                shards.verify()
                parts.append(len(shards.manifest["parts"]))
                assert content(whole)[: shards.tokens] == [int(i) for p in shards.ids() for i in p]
    assert kills
    assert parts == sorted(parts)
    finished = tokenize(source, tiny_tokenizer, root)
    assert finished.complete
    assert content(finished) == content(whole)
    assert finished.documents().tolist() == whole.documents().tolist()
