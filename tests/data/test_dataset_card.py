"""The card of a finished set, read back by the Hub's client and by `datasets`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import datasets
import pytest
import yaml
from huggingface_hub import DatasetCard
from hypothesis import given
from hypothesis import strategies as st

from fastdraft_hf._atomic import write_json
from fastdraft_hf.data.dataset_card import SetFacts, fenced, kept_first, write_dataset_card
from fastdraft_hf.data.filters import RowFilters, judge_rows, write_filters
from fastdraft_hf.data.generated import read_rows, write_rows

from .fakes import FakeEngine, make_requests

FACTS = SetFacts(
    name="chat",
    about="Instructions and answers.",
    target="some/model",
    revision="abc",
    engine="fake",
    license="apache-2.0",
    settings={"temperatures": [0.0, 0.6], "dataset": "some/questions", "column": "a | b"},
    prompts={"kept": 23, "overlaps held-out text": 2},
    kept={"kept": 22, "loop": 1},
    language="en",
)


def decode(ids: Any) -> str:
    return " ".join(map(str, ids))


@pytest.fixture
def made(tmp_path: Path) -> Path:
    folder = tmp_path / "chat"
    write_rows(FakeEngine(), make_requests(23), folder, rows_per_shard=5)
    write_json(folder / "prompts.json", {"prompts": 23})
    return folder


def write(folder: Path, facts: SetFacts = FACTS) -> str:
    rows = read_rows(folder)
    write_filters(folder, rows, judge_rows(rows), RowFilters())
    write_dataset_card(folder, rows, facts, decode)
    return (folder / "README.md").read_text(encoding="utf-8")


def test_datasets_reads_the_folder_by_its_card(made: Path, tmp_path: Path) -> None:
    """Offline, the shards and nothing else of the folder: the other files are no rows."""
    rows = read_rows(made)
    write(made)
    cache = str(tmp_path / "cache")
    found = datasets.load_dataset(str(made), cache_dir=cache)
    assert list(found) == ["train"]
    assert found["train"].to_list() == rows
    streamed = datasets.load_dataset(str(made), split="train", streaming=True, cache_dir=cache)
    assert [row["index"] for row in streamed] == [row["index"] for row in rows]


def test_the_cache_does_not_take_one_set_for_another_of_its_name(tmp_path: Path) -> None:
    """Two runs have a set `chat` each; `datasets` would give the second the rows of the first."""
    cache = str(tmp_path / "cache")
    for number, count in enumerate((5, 7, 7)):
        folder = tmp_path / f"run-{number}" / "chat"
        write_rows(FakeEngine(), make_requests(count, f"run {number}"), folder)
        write(folder)
        found = datasets.load_dataset(str(folder), split="train", cache_dir=cache)
        assert found.to_list() == read_rows(folder)


def test_the_hubs_client_reads_its_metadata(made: Path) -> None:
    text = write(made)
    data = DatasetCard(text).data
    assert data.license == "apache-2.0"
    assert data.language == ["en"]
    assert data.size_categories == ["n<1K"]
    assert data.task_categories == ["text-generation"]
    (config,) = data.to_dict()["configs"]
    assert config.pop("description").startswith("rows ")
    assert config == {
        "config_name": "default",
        "data_files": [{"split": "train", "path": "part-*.parquet"}],
    }
    assert yaml.safe_load(text.split("---")[1])["pretty_name"] == "chat, written by some/model"


def test_it_says_what_a_reader_needs(made: Path) -> None:
    text = write(made)
    rows = read_rows(made)
    tokens = sum(len(row["completion_ids"]) for row in rows)
    for said in (
        "some/model** (abc) through fake",
        f"23 rows, {tokens} completion tokens; finished by: 23 stop.",
        "| temperatures | [0.0, 0.6] |",
        "| column | a \\| b |",
        "| overlaps held-out text | 2 |",
        "| loop | 1 |",
        "`filters.json`",
        'AutoTokenizer.from_pretrained("some/model")',
        "apache-2.0, holds for what it wrote. The prompts are from some/questions",
    ):
        assert said in text, said
    assert all(f"| `{name}` |" in text for name in rows[0])
    assert text.count("), completion") == 0
    samples = re.findall(
        r"Row (\d+), completion \(temperature ([\d.]+), stop\):\n\n```text\n(.*)\n", text
    )
    assert len(samples) == 3
    for index, temperature, sample in samples:
        row = next(r for r in rows if r["index"] == int(index))
        assert sample == decode(row["completion_ids"])
        assert float(temperature) == pytest.approx(row["temperature"])


def test_without_a_license_or_a_language(made: Path) -> None:
    text = write(made, SetFacts("free", "Free text.", "folder", None, "fake", None, {}))
    data = DatasetCard(text).data.to_dict()
    assert "license" not in data
    assert "language" not in data
    assert "declares no license that was found" in text


def test_an_empty_set_has_a_card(tmp_path: Path) -> None:
    write_rows(FakeEngine(), [], tmp_path / "none")
    assert "0 rows, 0 completion tokens; finished by: none." in write(tmp_path / "none")


@given(st.text(alphabet="`ab\n~", max_size=30))
def test_nothing_in_a_text_closes_its_fence(text: str) -> None:
    first, *_, last = fenced(text).split("\n")
    assert first == f"{last}text"
    assert set(last) == {"`"}
    assert last not in text


def test_counts_are_in_order() -> None:
    counts = {"loop": 2, "kept": 1, "empty": 5, "cut off": 2}
    assert list(kept_first(counts)) == ["kept", "empty", "cut off", "loop"]
    assert kept_first({"loop": 2}) == {"kept": 0, "loop": 2}
