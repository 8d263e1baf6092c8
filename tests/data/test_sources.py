from __future__ import annotations

from pathlib import Path

import pytest

from fastdraft_hf._errors import FastDraftError
from fastdraft_hf.data.sources import (
    Source,
    check_source,
    summary_keys,
)


def test_sources_are_checked_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(FastDraftError, match=r"^pretrain\.sources\[0\]\.name: no file matches"):
        check_source(Source(kind="files", name=str(tmp_path / "*.txt")), "pretrain.sources[0]", [])
    with pytest.raises(FastDraftError, match="has no set 'b'; it has: a"):
        check_source(Source(name="b"), "align.sources[0]", ["a"])
    with pytest.raises(FastDraftError, match="it has: none"):
        check_source(Source(name="b"), "align.sources[0]", [])
    check_source(Source(name="a"), "align.sources[0]", ["a"])
    check_source(Source(kind="python"), "pretrain.sources[0]", [])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "files"}, "name: needed for kind files"),
        ({"kind": "hub"}, "name: needed for kind hub"),
        ({}, "name: needed for kind generated"),
        ({"kind": "python", "weight": 0}, "weight: must be above 0, got 0"),
        ({"kind": "python", "extensions": [".py"]}, "extensions: for kind files only, not python"),
    ],
)
def test_sources_refuse_nonsense(fields: dict, message: str) -> None:
    with pytest.raises(FastDraftError, match=f"^{message}"):
        Source(**fields)


def test_files_of_a_folder_by_their_endings(tmp_path: Path) -> None:
    for name in ("a.py", "b.md", "sub/c.py", "sub/.hidden/d.py", ".git/e.py", "f.jsonl.gz"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")

    def names(**fields: object) -> list[str]:
        source = Source(kind="files", **fields)  # type: ignore[arg-type]
        return [str(p.relative_to(tmp_path)) for p in source.matching_files()]

    assert names(name=str(tmp_path)) == ["a.py", "b.md", "f.jsonl.gz", "sub/c.py"]
    assert names(name=str(tmp_path), extensions=[".py"]) == ["a.py", "sub/c.py"]
    assert names(name=str(tmp_path / "*.gz")) == ["f.jsonl.gz"]
    with pytest.raises(FastDraftError, match=r"no file matches .* with \.rs"):
        check_source(Source(kind="files", name=str(tmp_path), extensions=[".rs"]), "p", [])


def test_names_in_a_summary_are_different() -> None:
    sources = [Source(name="a"), Source(kind="python"), Source(name="a"), Source(name="a")]
    assert summary_keys(sources) == ["a", "python", "a #2", "a #3"]
