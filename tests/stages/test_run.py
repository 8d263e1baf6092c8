import contextlib
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from filelock import FileLock

from fastdraft_hf import FastDraftError
from fastdraft_hf.hub.folder import FOLDERS
from fastdraft_hf.recipe import Recipe, build_recipe
from fastdraft_hf.stages import runner as module
from fastdraft_hf.stages.generate import unchanged
from fastdraft_hf.stages.run import Run
from fastdraft_hf.stages.runner import Stage, choose, execute, grows, planned
from fastdraft_hf.target.resolve import Target

DATA = {
    "target": "some/model",
    "generate": {"sets": {"chat": {"rows": 4}}},
    "align": {"sources": [{"name": "chat"}]},
}
ORDER = ["design", "generate", "align", "evaluate", "card"]


MORE = "generate.sets.chat.rows=6"
ANOTHER = "generate.sets.more={rows: 2}"
CODE = "generate.sets.code={kind: code, rows: 4}"
FEWER = "generate.sets.code={kind: code, rows: 3}"
Make = Callable[..., Run]


class Killed(BaseException):
    """Stands for a kill inside a stage; nothing of ours catches it."""


class FakeStages:
    """Small stages with the real sections; each counts its calls and writes one line."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.killed = ""

    def stage(self, name: str) -> Callable[[Run, Path], dict[str, Any]]:
        def work(run: Run, folder: Path) -> dict[str, Any]:
            self.calls.append(name)
            place = folder / "chat" if name == "generate" else folder  # a set of rows
            place.mkdir(exist_ok=True)
            rows = place / "rows.txt"
            with rows.open("a", encoding="utf-8") as stream:
                stream.write("row\n")
            if name == self.killed:
                raise Killed
            return {"rows": len(rows.read_text(encoding="utf-8").splitlines())}

        return work

    def kill(self, run: Run, name: str) -> Path:
        """Run until a stage is killed; return its partial folder."""
        self.killed = name
        with pytest.raises(Killed):
            run_all(run)
        self.killed = ""
        return run.partial_folder(name)


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> FakeStages:
    fakes = FakeStages()
    inputs = {
        "design": (),
        "generate": (),
        "pretrain": ("design", "generate"),
        "align": ("generate", "design", "pretrain"),
        "evaluate": ("design", "align"),
        "card": ("align", "evaluate"),
    }
    stages = {name: Stage(fakes.stage(name), read) for name, read in inputs.items()}
    stages["generate"] = Stage(fakes.stage("generate"), keeps=unchanged)
    monkeypatch.setattr(module, "STAGES", stages)
    return fakes


@pytest.fixture
def make_run(tmp_path: Path, fakes: FakeStages) -> Make:
    def make(*overrides: str) -> Run:
        target = Target(tmp_path, "some/model", "abc")
        return Run(build_recipe(DATA, overrides), tmp_path / "run", _target=target)

    return make


def run_all(run: Run) -> None:
    execute(run, choose(run.recipe, None))


def record(run: Run, stage: str) -> dict[str, Any]:
    path = run.stage_folder(stage) / "provenance.json"
    data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return data


def names(run: Run) -> set[str]:
    return {path.name for path in run.folder.iterdir()} - {"recipe.yaml"}


def made(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    return config


def forget(folder: Path, *path: Any) -> None:
    """Remove a setting from what a folder was made with, as if the setting were newer."""
    config = made(folder)
    holder: Any = config
    for key in path[:-1]:
        holder = holder[key]
    del holder[path[-1]]
    (folder / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")


def test_stages_run_once_and_in_their_order(fakes: FakeStages, make_run: Make) -> None:
    run = make_run()
    assert planned(run.recipe) == ORDER
    execute(run, ["design", "generate"])
    ids = {stage: record(run, stage)["id"] for stage in ("design", "generate")}
    for _ in range(2):
        run_all(make_run())
        assert fakes.calls == ORDER
    assert names(run) == {"design", "generate", "align", "evaluate", "draft", ".lock"}
    align = record(run, "align")
    assert (align["stage"], align["facts"], align["runs"]) == ("align", {"rows": 1}, 1)
    assert (align["target"], align["target_revision"], align["seed"]) == ("some/model", "abc", 0)
    # Pretrain is not in the recipe, so align does not wait for it.
    assert align["inputs"] == ids
    files = {path.name for path in run.stage_folder("align").iterdir()}
    assert files == {"rows.txt", "config.yaml", "provenance.json"}
    assert made(run.stage_folder("align"))["align"] == run.recipe.resolved()["align"]


def test_the_real_stages_are_all_in_the_recipes_keys() -> None:
    recipe, order = Recipe().resolved(), list(module.STAGES)
    assert order == list(FOLDERS)
    for name, stage in module.STAGES.items():
        assert name in recipe or name == "report"
        # An input that comes later could never be finished.
        assert all(order.index(other) < order.index(name) for other in stage.inputs), name


@pytest.mark.parametrize(
    ("path", "override", "message"),
    [
        (("evaluate", "path"), "evaluate.path=transformers", r"path: ours then, transformers now"),
        (("align", "sources", 0, "data_dir"), "align.sources.0.data_dir=x", r"sources: .* then"),
    ],
)
def test_a_setting_newer_than_a_finished_folder_had_its_default(
    fakes: FakeStages, make_run: Make, path: tuple[Any, ...], override: str, message: str
) -> None:
    run_all(make_run())
    forget(make_run().stage_folder(path[0]), *path)
    run_all(make_run())
    assert fakes.calls == ORDER
    with pytest.raises(FastDraftError, match=message):
        run_all(make_run(override))


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["align.max_length=77"], "align.max_length: 512 then, 77 now"),
        (["align.sources.0.weight=2"], "align.sources"),
        (["seed=1"], "seed: 0 then, 1 now"),
        (["target=other/model"], "target: some/model then, other/model now"),
        (["generate.sets.chat.rows=3"], "generate.sets.chat.rows: 4 then, 3 now"),
        # More rows, but not of the same.
        ([MORE, "seed=1"], "seed: 0 then, 1 now"),
        ([MORE, "generate.sets.chat.top_p=0.9"], "generate.sets.chat.top_p"),
        ([MORE, "generate.sets.chat.max_minutes=5"], "generate.sets.chat.max_minutes"),
    ],
)
def test_changed_settings_of_a_finished_stage_are_refused(
    fakes: FakeStages, make_run: Make, overrides: list[str], named: str
) -> None:
    run_all(make_run())
    run = make_run(*overrides)
    with pytest.raises(FastDraftError, match="was made with other settings") as caught:
        run_all(run)
    assert named in str(caught.value)
    assert not grows(run, "generate")
    assert fakes.calls == ORDER  # refused before any work


def test_a_finished_stage_that_lost_its_files_is_made_again(make_run: Make) -> None:
    folder = make_run().stage_folder("generate")
    execute(make_run(), ["generate"])
    shutil.rmtree(folder / "chat")
    (folder / "provenance.json").write_text("{}", encoding="utf-8")
    execute(make_run(MORE), ["generate"])
    assert record(make_run(), "generate")["facts"] == {"rows": 1}


def test_what_a_stage_does_not_read_may_change(fakes: FakeStages, make_run: Make) -> None:
    execute(make_run(), ["design", "generate", "align"])
    run_all(make_run("evaluate.max_new_tokens=9", "output_dir=elsewhere"))
    assert fakes.calls == ORDER


def test_a_stage_made_again_makes_those_after_it_stale(make_run: Make) -> None:
    run = make_run()
    run_all(run)
    shutil.rmtree(run.stage_folder("design"))
    execute(run, ["design"])
    with pytest.raises(FastDraftError, match=r"align was made with .*inputs\.design: design-"):
        run_all(run)


def test_a_killed_stage_resumes_in_its_partial_folder(fakes: FakeStages, make_run: Make) -> None:
    run = make_run()
    for _ in range(2):
        partial = fakes.kill(run, "align")
        assert names(run) == {"design", "generate", ".align.partial", ".lock"}
    # A kill inside an atomic write leaves a temporary file or folder.
    (partial / ".sessions.json.abc123.tmp").write_text("torn", encoding="utf-8")
    (partial / ".model.xyz789.tmp").mkdir()
    (partial / ".model.xyz789.tmp" / "weights").write_text("torn", encoding="utf-8")
    # The time from a kill to the next run does not count.
    sessions = json.loads((partial / "sessions.json").read_text(encoding="utf-8"))
    sessions["started"] -= 1000
    (partial / "sessions.json").write_text(json.dumps(sessions), encoding="utf-8")
    for path in partial.rglob("*"):
        os.utime(path, (time.time() - 990,) * 2)

    run_all(make_run())  # the lock is free again
    assert fakes.calls == ["design", "generate", "align", "align", "align", "evaluate", "card"]
    assert names(run) == {"design", "generate", "align", "evaluate", "draft", ".lock"}
    found = record(run, "align")
    assert (found["runs"], found["facts"]) == (3, {"rows": 3})
    assert 9 < found["wall_seconds"] < 60
    assert record(run, "evaluate")["runs"] == 1
    files = {path.name for path in run.stage_folder("align").iterdir()}
    assert files == {"rows.txt", "config.yaml", "provenance.json"}


@pytest.mark.parametrize(
    ("stage", "change"),
    [
        ("align", "align.learning_rate=1e-5"),
        ("generate", "seed=1"),
        ("generate", "generate.batch_size=3"),
        ("generate", "generate.sets.chat.rows=3"),
    ],
)
def test_a_partial_folder_of_other_settings_is_moved_aside(
    fakes: FakeStages, make_run: Make, stage: str, change: str
) -> None:
    fakes.kill(make_run(), stage)
    shutil.rmtree(make_run().stage_folder("design"))
    run = make_run(change)
    run_all(run)
    assert (record(run, stage)["runs"], record(run, stage)["facts"]) == (1, {"rows": 1})
    (rows,) = run.folder.glob(f".{stage}.partial-*/**/rows.txt")
    assert rows.read_text(encoding="utf-8") == "row\n"


def start_generate(fakes: FakeStages, run: Run) -> Path:
    """Kill stage generate and lay files where its sets chat and code would be."""
    partial = fakes.kill(run, "generate")
    for name in ("chat", "code"):
        (partial / name).mkdir(exist_ok=True)
        (partial / name / "part-00000.parquet").write_text(name)
    return partial


def test_sets_that_did_not_change_stay_where_others_did(fakes: FakeStages, make_run: Make) -> None:
    start_generate(fakes, make_run(CODE, "generate.sets.chat={kind: magpie, rows: 4}"))
    # One set grows, one is asked for less, and one is new.
    run = make_run(FEWER, "generate.sets.chat={kind: magpie, rows: 6}", ANOTHER)
    execute(run, ["generate"])
    assert record(run, "generate")["runs"] == 2
    folder = run.stage_folder("generate")
    assert {p.name for p in folder.iterdir() if p.is_dir()} == {"chat"}
    assert made(folder)["generate"]["sets"]["code"]["rows"] == 3
    (aside,) = run.folder.glob(".generate.partial-*")
    assert {p.name for p in aside.iterdir()} == {"code", "config.yaml"}
    assert made(aside)["generate"]["sets"]["code"]["rows"] == 4


def test_killed_while_it_moves_what_changed(
    fakes: FakeStages, make_run: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    partial = start_generate(fakes, make_run(CODE))
    (partial / "another").mkdir()
    rename = Path.rename

    def killed_after_one(path: Path, to: Path) -> Path:
        if path.name == "code":
            raise Killed
        return rename(path, to)

    fewer = make_run(FEWER)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killed_after_one)
        with pytest.raises(Killed):
            execute(fewer, ["generate"])
    assert not (partial / "another").exists()
    assert (partial / "code").exists()
    execute(fewer, ["generate"])
    assert (fewer.stage_folder("generate") / "chat" / "part-00000.parquet").exists()
    assert not (fewer.stage_folder("generate") / "code").exists()


@pytest.mark.parametrize("change", [MORE, ANOTHER])
@pytest.mark.parametrize("killed", [False, True])
def test_a_finished_stage_is_extended(
    fakes: FakeStages, make_run: Make, change: str, killed: bool
) -> None:
    execute(make_run(), ["design", "generate"])
    before = record(make_run(), "generate")
    run = make_run(change)
    assert grows(run, "generate")
    if killed:
        fakes.kill(run, "generate")
        assert names(run) == {"design", ".generate.partial", ".lock"}
    run_all(make_run(change))
    after = record(run, "generate")
    # One line of each time it ran, in the same folder.
    times = 3 if killed else 2
    assert (after["facts"], after["runs"]) == ({"rows": times}, times)
    assert after["wall_seconds"] >= before["wall_seconds"]
    assert after["extends"] == [before["id"]] != [after["id"]]
    assert fakes.calls.count("design") == 1
    assert not grows(run, "generate")
    sets = made(run.stage_folder("generate"))["generate"]["sets"]
    assert sets.keys() == run.recipe.resolved()["generate"]["sets"].keys()
    assert names(run) == {"design", "generate", "align", "evaluate", "draft", ".lock"}


def test_a_killed_stage_resumes_when_more_is_asked_for(fakes: FakeStages, make_run: Make) -> None:
    fakes.kill(make_run(), "generate")
    execute(make_run(MORE, ANOTHER), ["generate"])
    assert record(make_run(), "generate")["facts"] == {"rows": 2}


def test_what_was_made_from_less_is_named_before_any_work(
    fakes: FakeStages, make_run: Make
) -> None:
    run_all(make_run())
    run = make_run(MORE)
    with pytest.raises(FastDraftError, match="generate must be extended") as caught:
        run_all(run)
    folders = [str(run.stage_folder(name)) for name in ("align", "evaluate", "card")]
    assert ", ".join(folders) in str(caught.value)
    assert str(run.stage_folder("design")) not in str(caught.value)
    assert fakes.calls == ORDER
    assert record(run, "generate")["facts"] == {"rows": 1}
    for folder in folders:
        shutil.rmtree(folder)
    run_all(run)
    assert record(run, "generate")["facts"] == {"rows": 2}


def test_a_stage_that_reads_no_generated_text_does_not_wait_for_it(
    fakes: FakeStages, make_run: Make
) -> None:
    python = "pretrain={sources: [{kind: python}]}"
    execute(make_run(python), ["design", "pretrain"])
    assert fakes.calls == ["design", "pretrain"]
    assert list(record(make_run(), "pretrain")["inputs"]) == ["design"]
    run_all(make_run(python))
    assert fakes.calls.count("pretrain") == 1
    with pytest.raises(FastDraftError, match=r"inputs\.generate: None then"):
        run_all(make_run("pretrain={sources: [{name: chat}]}"))


def test_folders_that_do_not_fit_are_refused(fakes: FakeStages, make_run: Make) -> None:
    run = make_run()
    with pytest.raises(FastDraftError, match="stage align reads the output of generate"):
        execute(run, ["align"])
    assert names(run) <= {".lock"}
    run.stage_folder("align").mkdir()
    with pytest.raises(FastDraftError, match="align exists and was not made by a finished stage"):
        run_all(run)
    assert fakes.calls == []


def test_stages_are_chosen_in_the_recipes_order(make_run: Make) -> None:
    recipe = make_run().recipe
    assert choose(recipe, None) == ORDER
    assert choose(recipe, ["align", "design"]) == ["design", "align"]
    with pytest.raises(FastDraftError, match=r"no stage 'alin' \(did you mean 'align'\?\); stag"):
        choose(recipe, ["alin"])
    with pytest.raises(FastDraftError, match="the recipe has no section 'pretrain'"):
        choose(recipe, ["pretrain"])


def test_a_second_process_is_refused(fakes: FakeStages, make_run: Make) -> None:
    run = make_run()
    run.folder.mkdir()
    with FileLock(run.folder / ".lock"):
        with pytest.raises(FastDraftError, match="another fastdraft process works in"):
            run_all(run)
        assert fakes.calls == []
    run_all(run)
    assert fakes.calls == ORDER


@pytest.mark.parametrize("text", ["", "{", "[1]", "a: b: c", "{}", "\0"])
@pytest.mark.parametrize("name", ["provenance.json", "config.yaml"])
def test_a_damaged_record_is_one_line(
    name: str, text: str, fakes: FakeStages, make_run: Make
) -> None:
    run = make_run()
    execute(run, ["design", "generate"])
    file = run.stage_folder("generate") / name
    file.write_text(text, encoding="utf-8")
    with contextlib.suppress(FastDraftError):  # the only exception that is allowed
        execute(make_run(MORE), ["generate", "align"])
        assert name == "provenance.json"  # its id is unknown, so that all is made again
        assert text in ("[1]", "{}")


def test_the_latest_model_is_the_last_trained(make_run: Make) -> None:
    run = make_run()
    with pytest.raises(FastDraftError, match="stage align is not finished"):
        run.latest_model()
    with pytest.raises(FastDraftError, match="stage design is not finished"):
        run.latest_model(before="align")
    execute(run, ["design", "generate"])
    assert run.latest_model(before="align") == run.folder / "design"
    with pytest.raises(FastDraftError, match="stage align is not finished"):
        run.latest_model()  # an untrained draft is never taken for a trained one
    execute(run, ["align"])
    assert run.latest_model() == run.folder / "align"
    assert run.latest_model(before="evaluate") == run.folder / "align"


@pytest.mark.parametrize("damage", [lambda file: file.write_bytes(b"wEights"), Path.unlink])
def test_weights_that_changed_are_named_by_the_stage_that_reads_them(
    fakes: FakeStages, make_run: Make, damage: Callable[[Path], Any]
) -> None:
    run = make_run()
    (fakes.kill(run, "design") / "model.safetensors").write_bytes(b"weights")
    execute(run, ["design", "generate"])
    weights = run.stage_folder("design") / "model.safetensors"
    damage(weights)
    with pytest.raises(FastDraftError, match=rf"{weights} is damaged.*delete .*design to make"):
        execute(run, ["align"])
    assert "align" not in fakes.calls
    weights.write_bytes(b"weights")
    execute(run, ["align"])


@pytest.mark.parametrize("killed", [False, True])
def test_another_target_in_the_same_folder(
    fakes: FakeStages, make_run: Make, tmp_path: Path, killed: bool
) -> None:
    weights = tmp_path / "mine" / "model.safetensors"
    weights.parent.mkdir()
    weights.write_bytes(b"first")
    run = make_run(f"target={weights.parent}")
    execute(run, ["design"])
    if killed:
        fakes.kill(run, "generate")
    before = weights.stat()
    weights.write_bytes(b"other")
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(FastDraftError, match=r"target: the weights in .*mine are not those that"):
        execute(run, ["generate"])
    weights.write_bytes(b"first")
    execute(run, ["generate"])
