import shutil
from pathlib import Path
from typing import Any

import pytest

from fastdraft_hf._atomic import write_json
from fastdraft_hf._errors import FastDraftError
from fastdraft_hf.hub.folder import (
    FOLDERS,
    earlier_training,
    find_run,
    read_record,
)
from fastdraft_hf.stages.runner import STAGES

ROOT = Path(__file__).parents[2]


def test_the_folders_are_those_of_the_stages() -> None:
    assert list(STAGES) == list(FOLDERS)


def test_a_run_and_its_draft_are_found_from_either(run_folder: Path, tmp_path: Path) -> None:
    of_run, of_draft = find_run(run_folder), find_run(run_folder / "draft")
    assert of_run.draft == run_folder / "draft"
    assert of_run.run == run_folder
    assert of_draft.run == run_folder.resolve()
    alone = Path(shutil.copytree(run_folder / "draft", tmp_path / "alone"))
    assert find_run(alone).run is None
    assert find_run(alone).summary.evaluation is None
    assert list(find_run(alone).records) == ["card"]


def test_finished_openvino_folders_are_found(run_folder: Path) -> None:
    found = find_run(run_folder)
    for name in ("openvino-int8", 'openvino-"x"'):
        made = run_folder / "export" / name
        made.mkdir(parents=True)
        assert found.openvino_folders() == []
        (made / "openvino_model.xml").write_text("<xml/>", encoding="utf-8")
        if name == "openvino-int8":
            assert found.openvino_folders() == [made]
            shutil.rmtree(made)
    assert found.openvino_folders() == []  # its name would be code on the card


def test_what_a_draft_was_trained_on_before(tmp_path: Path) -> None:
    """For a published draft, for a run's, for a stage's; and over several such steps."""

    def record(stage: str, seconds: float, **facts: Any) -> dict[str, Any]:
        return {"stage": stage, "wall_seconds": seconds, "facts": facts}

    run = tmp_path / "run"
    records = {
        "design": record("design", 1, earlier={"tokens": 1000, "seconds": 50.0}),
        "generate": record("generate", 500, tokens=7),
        "pretrain": record("pretrain", 20, tokens=200),
        "align": record("align", 30, tokens=40),
        "card": record("card", 1),
    }
    for stage, found in records.items():
        (run / FOLDERS[stage]).mkdir(parents=True)
        write_json(run / FOLDERS[stage] / "provenance.json", found)
    assert earlier_training(run / "draft") == {"tokens": 1240, "seconds": 100.0}
    assert earlier_training(run / "pretrain") == {"tokens": 1200, "seconds": 70.0}
    published = tmp_path / "published"
    published.mkdir()
    assert earlier_training(published) is None
    write_json(published / "provenance.json", records)
    assert earlier_training(published) == {"tokens": 1240, "seconds": 100.0}
    (published / "provenance.json").write_text("{", encoding="utf-8")
    with pytest.raises(FastDraftError, match="not valid JSON"):
        read_record(published)
    shipped = earlier_training(ROOT / "model_cards/SmolLM2-135M-Instruct-FastDraft")
    assert shipped is not None
    assert shipped["tokens"] >= 31_508_823
