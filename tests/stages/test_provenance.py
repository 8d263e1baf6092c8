import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import fastdraft_hf
from fastdraft_hf._errors import redacted
from fastdraft_hf.stages import provenance

# No such token exists; it only has the shape of one.
SHAPE = "hf_" + "aB3" * 8


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"run --x {SHAPE} y", "run --x [redacted] y"),
        ("run hub_token=abc123 seed=1", "run hub_token=[redacted] seed=1"),
        ("api_key=abc secret=x password=p", "api_key=[redacted] secret=[redacted] password=[reda"),
        ("run recipe.yaml chf_something", "run recipe.yaml chf_something"),
    ],
)
def test_credentials_are_redacted(text: str, expected: str) -> None:
    assert redacted(text).startswith(expected)
    assert "abc" not in redacted(text)


def test_a_record_says_what_it_was_made_with(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["fastdraft", "run", "r.yaml", f"hub_token={SHAPE}"])
    record = provenance.describe(stage="align", facts={"steps": 3})
    assert record["command"] == "fastdraft run r.yaml hub_token=[redacted]"
    assert record["stage"] == "align"
    assert record["facts"] == {"steps": 3}
    versions = record["versions"]
    assert versions["fastdraft_hf"] == fastdraft_hf.__version__
    assert {"torch", "transformers", "trl", "python"} <= versions.keys()
    assert record["machine"]["cpu_count"] >= 1
    assert record["peak_memory_bytes"] > 10**7
    text = json.dumps(record)
    assert SHAPE not in text
    assert socket.gethostname() not in text  # neither the machine's name nor the user's folders
    assert str(Path.home()) not in json.dumps({**record, "command": ""})


def test_the_commit_says_when_the_checkout_is_edited(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def git(*words: str) -> str:
        identity = ["-c", "user.name=t", "-c", "user.email=t@example.invalid"]
        command = ["git", "-C", str(tmp_path), *identity, *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    source = tmp_path / "provenance.py"
    source.write_text("1\n", encoding="utf-8")
    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "first")
    monkeypatch.setattr(provenance, "__file__", str(source))
    assert provenance.git_commit() == git("rev-parse", "HEAD")
    source.write_text("2\n", encoding="utf-8")
    assert provenance.git_commit() == git("rev-parse", "HEAD") + "+"


def test_without_a_checkout_there_is_no_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "provenance.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert provenance.git_commit() is None
    monkeypatch.setenv("PATH", "")
    assert provenance.git_commit() is None
