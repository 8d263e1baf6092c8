from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

import fastdraft_hf.stages.registry  # noqa: F401  (fills STAGES)
from fastdraft_hf._atomic import write_json
from fastdraft_hf._errors import FastDraftError
from fastdraft_hf.hub.files import without_paths
from fastdraft_hf.hub.run_folder import FOLDERS, card_of_run, earlier_training, find_run
from fastdraft_hf.stages.runner import STAGES

ROOT = Path(__file__).parents[2]
Command = Callable[..., tuple[int, str]]


def test_the_folders_are_those_of_the_pipeline() -> None:
    ours = list(FOLDERS.items())
    theirs = [(name, stage.folder) for name, stage in STAGES.items()]
    # Stages that draw nothing for a card may come and go; those that are here must be the same.
    assert [one for one in theirs if one[0] in FOLDERS] == ours


def test_a_run_and_its_draft_are_found_from_either(run_folder: Path, tmp_path: Path) -> None:
    of_run, of_draft = find_run(run_folder), find_run(run_folder / "draft")
    assert of_run.draft == run_folder / "draft"
    assert of_run.run == run_folder
    assert of_draft.run == run_folder.resolve()
    assert [s.name for s in of_run.generated_sets()] == ["chat"]
    assert of_run.openvino_folders() == []
    alone = Path(shutil.copytree(run_folder / "draft", tmp_path / "alone"))
    assert find_run(alone).run is None
    assert find_run(alone).summary.evaluation is None


def test_a_half_written_openvino_folder_is_none(run_folder: Path) -> None:
    made = run_folder / "export" / "openvino-int8"
    made.mkdir(parents=True)
    assert find_run(run_folder).openvino_folders() == []
    (made / "openvino_model.xml").write_text("<xml/>", encoding="utf-8")
    assert find_run(run_folder).openvino_folders() == [made]


def test_the_card_of_a_run(run_folder: Path) -> None:
    card = card_of_run(find_run(run_folder), draft_location="user/draft")
    assert card.data.model_name == "Target-FastDraft"
    assert card.data.base_model == "org/Target"
    assert card.data.license == "apache-2.0"
    assert "(abc123)" in card.text
    shutil.rmtree(run_folder / "draft")  # a run whose card was not made yet
    again = card_of_run(find_run(run_folder), draft_location="user/draft")
    assert again.data.model_name == "Target-FastDraft-10M"
    assert again.data.license == "apache-2.0"  # of recipe.yaml
    (run_folder / "evaluate" / "results.json").unlink()
    with pytest.raises(FastDraftError, match="needs the records of a run with evaluate/ finished"):
        card_of_run(find_run(run_folder), draft_location="user/draft")


def test_the_command_renders_it(run_folder: Path, tmp_path: Path, fastdraft: Command) -> None:
    status, said = fastdraft("card", run_folder)
    assert status == 0, said
    assert f'from_pretrained("{run_folder / "draft"}")' in said
    path = tmp_path / "card.md"
    assert fastdraft("card", run_folder, "--output", path)[0] == 0
    assert ModelCard.load(path).data.model_name == "Target-FastDraft"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("nowhere",), "there is no folder nowhere"),
        (("--output", "x.md"), "--output needs DIR"),
        (("a", "b"), "with DIR there is only --output"),
        (("a", "seed=1"), "with DIR there is only --output"),
    ],
)
def test_what_the_command_refuses(fastdraft: Command, words: tuple[str, ...], said: str) -> None:
    status, printed = fastdraft("card", *words)
    assert status == 2
    assert said in printed


def test_paths_are_cut_down() -> None:
    command = "/opt/bin/fastdraft run r.yaml output_dir=/data/me/runs/x target=org/T"
    assert without_paths(command) == "fastdraft run r.yaml output_dir=x target=org/T"
    assert without_paths("org/T and a/b") == "org/T and a/b"


def test_what_a_draft_was_trained_on_before(tmp_path: Path) -> None:
    """Of a published draft, of a run's, of a stage's; and over several such steps."""

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
    assert earlier_training(run / "align") == {"tokens": 1240, "seconds": 100.0}
    assert earlier_training(run / "pretrain") == {"tokens": 1200, "seconds": 70.0}
    published = tmp_path / "published"
    published.mkdir()
    assert earlier_training(published) is None  # whoever made it
    write_json(published / "provenance.json", records)
    assert earlier_training(published) == {"tokens": 1240, "seconds": 100.0}
    shipped = earlier_training(ROOT / "model_cards/SmolLM2-135M-Instruct-FastDraft")
    assert shipped is not None
    assert shipped["tokens"] >= 31_508_823
