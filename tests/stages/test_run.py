from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import fastdraft_hf.stages.registry  # noqa: F401  (fills STAGES, which the fixture replaces)
from fastdraft_hf import FastDraftError
from fastdraft_hf.recipe import Recipe, build_recipe
from fastdraft_hf.stages import runner as module
from fastdraft_hf.stages.generate import unchanged
from fastdraft_hf.stages.runner import Run, Stage, choose, execute, grows, planned
from fastdraft_hf.target.resolve import Target

DATA = {
    "target": "some/model",
    "generate": {"sets": {"chat": {"rows": 4}}},
    "align": {"sources": [{"name": "chat"}]},
}
ORDER = ["design", "generate", "align", "evaluate", "card"]


class Killed(BaseException):
    """Stands for a kill inside a stage; nothing of ours catches it."""


class FakeStages:
    """Five small stages with the real sections; each counts its calls and writes one file."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.killed: set[str] = set()

    def stage(self, name: str) -> Callable[[Run, Path], dict[str, Any]]:
        def work(run: Run, folder: Path) -> dict[str, Any]:
            self.calls.append(name)
            place = folder / "chat" if name == "generate" else folder  # a set of rows
            place.mkdir(exist_ok=True)
            rows = place / "rows.txt"
            with rows.open("a", encoding="utf-8") as stream:
                stream.write("row\n")
            if name in self.killed:
                raise Killed
            return {"rows": len(rows.read_text(encoding="utf-8").splitlines())}

        return work


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> FakeStages:
    fakes = FakeStages()
    stages = {
        "design": Stage(fakes.stage("design"), lambda r: r.design, (), "design"),
        "generate": Stage(
            fakes.stage("generate"),
            lambda r: r.generate,
            (),
            "generate",
            keeps=unchanged,
        ),
        "pretrain": Stage(
            fakes.stage("pretrain"),
            lambda r: r.pretrain,
            ("design", "generate"),
            "pretrain",
            leaves_out=module.STAGES["pretrain"].leaves_out,
        ),
        "align": Stage(
            fakes.stage("align"), lambda r: r.align, ("generate", "design", "pretrain"), "align"
        ),
        "evaluate": Stage(
            fakes.stage("evaluate"), lambda r: r.evaluate, ("design", "align"), "evaluate"
        ),
        "card": Stage(fakes.stage("card"), lambda r: r.card, ("align", "evaluate"), "draft"),
    }
    monkeypatch.setattr(module, "STAGES", stages)
    return fakes


@pytest.fixture
def make_run(tmp_path: Path, fakes: FakeStages) -> Callable[..., Run]:
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


def test_stages_run_in_their_order_and_only_those_of_the_recipe(
    fakes: FakeStages, make_run: Callable[..., Run]
) -> None:
    run = make_run()
    assert planned(run.recipe) == ORDER
    run_all(run)
    assert fakes.calls == ORDER
    assert names(run) == {"design", "generate", "align", "evaluate", "draft", ".lock"}
    align = record(run, "align")
    assert align["stage"] == "align"
    assert align["facts"] == {"rows": 1}
    assert align["runs"] == 1
    assert (align["target"], align["target_revision"], align["seed"]) == ("some/model", "abc", 0)
    # Pretrain is not in the recipe, so align does not wait for it.
    ids = {stage: record(run, stage)["id"] for stage in ("design", "generate")}
    assert align["inputs"] == ids
    files = {path.name for path in run.stage_folder("align").iterdir()}
    assert files == {"rows.txt", "config.yaml", "provenance.json"}
    config = yaml.safe_load((run.stage_folder("align") / "config.yaml").read_text(encoding="utf-8"))
    assert config["align"] == run.recipe.resolved()["align"]


def test_finished_stages_are_not_run_again(fakes: FakeStages, make_run: Callable[..., Run]) -> None:
    run = make_run()
    execute(run, ["design", "generate"])
    ids = [record(run, stage)["id"] for stage in ("design", "generate")]
    run_all(make_run())
    assert fakes.calls == ORDER
    assert [record(run, stage)["id"] for stage in ("design", "generate")] == ids
    run_all(make_run())
    assert fakes.calls == ORDER


def test_the_real_stages_are_all_in_the_recipes_keys() -> None:
    from fastdraft_hf.stages.runner import STAGES

    recipe = Recipe().resolved()
    assert list(STAGES)[:2] == ["design", "generate"]
    order = list(STAGES)
    for name, stage in STAGES.items():
        assert name in recipe or name == "report"
        # An input that comes later could never be finished.
        assert all(order.index(other) < order.index(name) for other in stage.inputs), name
    assert len({stage.folder for stage in STAGES.values()}) == len(STAGES)


def test_a_setting_newer_than_a_finished_folder_had_its_default(
    fakes: FakeStages, make_run: Callable[..., Run]
) -> None:
    run = make_run()
    run_all(run)
    path = run.stage_folder("evaluate") / "config.yaml"
    made = yaml.safe_load(path.read_text(encoding="utf-8"))
    del made["evaluate"]["path"]
    path.write_text(yaml.safe_dump(made), encoding="utf-8")
    before = list(fakes.calls)
    run_all(make_run())
    assert fakes.calls == before
    with pytest.raises(FastDraftError, match=r"evaluate\.path: ours then, transformers now"):
        run_all(make_run("evaluate.path=transformers"))


def test_a_setting_of_a_source_newer_than_a_finished_folder_had_its_default(
    fakes: FakeStages, make_run: Callable[..., Run]
) -> None:
    run = make_run()
    run_all(run)
    path = run.stage_folder("align") / "config.yaml"
    made = yaml.safe_load(path.read_text(encoding="utf-8"))
    del made["align"]["sources"][0]["data_dir"]
    path.write_text(yaml.safe_dump(made), encoding="utf-8")
    before = list(fakes.calls)
    run_all(make_run())
    assert fakes.calls == before
    with pytest.raises(FastDraftError, match=r"align\.sources: .* then"):
        run_all(make_run("align.sources.0.data_dir=x"))


@pytest.mark.parametrize(
    ("override", "named"),
    [
        (
            "align.max_length=77",
            "align.max_length: 512 then, 77 now",
        ),
        ("align.sources.0.weight=2", "align.sources"),
        ("seed=1", "seed: 0 then, 1 now"),
        ("target=other/model", "target: some/model then, other/model now"),
    ],
)
def test_changed_settings_of_a_finished_stage_are_refused(
    fakes: FakeStages, make_run: Callable[..., Run], override: str, named: str
) -> None:
    run_all(make_run())
    before = list(fakes.calls)
    with pytest.raises(FastDraftError) as caught:
        run_all(make_run(override))
    assert "was made with other settings" in str(caught.value)
    assert named in str(caught.value)
    assert fakes.calls == before  # refused before anything is done


def test_what_a_stage_does_not_read_may_change(
    fakes: FakeStages, make_run: Callable[..., Run]
) -> None:
    execute(make_run(), ["design", "generate", "align"])
    run_all(make_run("evaluate.max_new_tokens=9", "output_dir=elsewhere"))
    assert fakes.calls == ORDER


def test_a_stage_made_again_makes_those_after_it_stale(
    fakes: FakeStages, make_run: Callable[..., Run]
) -> None:
    run = make_run()
    run_all(run)
    old = run.stage_folder("design")
    old.rename(old.with_name("design-old"))
    execute(run, ["design"])
    with pytest.raises(FastDraftError, match=r"align was made with .*inputs\.design: design-"):
        run_all(run)


def test_a_kill_leaves_the_partial_folder_and_nothing_else(
    fakes: FakeStages, make_run: Callable[..., Run]
) -> None:
    run = make_run()
    fakes.killed = {"align"}
    with pytest.raises(Killed):
        run_all(run)
    assert names(run) == {"design", "generate", ".align.partial", ".lock"}
    assert not run.finished("align")

    fakes.killed = set()
    run_all(make_run())  # the lock is free again
    assert fakes.calls == ["design", "generate", "align", "align", "evaluate", "card"]
    assert names(run) == {"design", "generate", "align", "evaluate", "draft", ".lock"}
    found = record(run, "align")
    assert found["runs"] == 2
    assert found["facts"] == {"rows": 2}  # it went on with what the killed run had left
    assert found["wall_seconds"] >= 0
    assert record(run, "evaluate")["runs"] == 1


def test_a_stage_killed_many_times_counts_its_runs(
    fakes: FakeStages, make_run: Callable[..., Run]
) -> None:
    fakes.killed = {"align"}
    for _ in range(3):
        with pytest.raises(Killed):
            run_all(make_run())
    fakes.killed = set()
    run = make_run()
    run_all(run)
    assert record(run, "align")["runs"] == 4
    assert not (run.stage_folder("align") / "sessions.json").exists()


def test_a_partial_folder_of_other_settings_is_moved_aside(
    fakes: FakeStages, make_run: Callable[..., Run]
) -> None:
    fakes.killed = {"align"}
    with pytest.raises(Killed):
        run_all(make_run())
    fakes.killed = set()
    run = make_run("align.learning_rate=1e-5")
    run_all(run)
    assert record(run, "align")["runs"] == 1
    assert record(run, "align")["facts"] == {"rows": 1}
    (aside,) = [name for name in names(run) if name.startswith(".align.partial-")]
    assert (run.folder / aside / "rows.txt").read_text(encoding="utf-8") == "row\n"


def begin_generate(fakes: FakeStages, run: Run) -> Path:
    """Kill stage generate and lay files where its sets chat and code would be."""
    fakes.killed = {"generate"}
    with pytest.raises(Killed):
        execute(run, ["generate"])
    fakes.killed = set()
    partial = run.folder / ".generate.partial"
    for name in ("chat", "chat-instructions", "code"):
        (partial / name).mkdir(exist_ok=True)
        (partial / name / "part-00000.parquet").write_text(name)
    (partial / "held_out.json").write_text("{}")
    return partial


def rows_of_code(folder: Path) -> int:
    made = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    rows: int = made["generate"]["sets"]["code"]["rows"]
    return rows


def test_sets_that_did_not_change_stay_where_others_did(
    fakes: FakeStages, make_run: Callable[..., Run]
) -> None:
    two = "generate.sets.code={kind: code, rows: 4}"
    begin_generate(fakes, make_run(two, "generate.sets.chat={kind: magpie, rows: 4}"))
    # One set grows, one is asked for less, and one is new.
    fewer = "generate.sets.code={kind: code, rows: 3}"
    run = make_run(fewer, "generate.sets.chat={kind: magpie, rows: 6}", ANOTHER)
    execute(run, ["generate"])
    assert record(run, "generate")["runs"] == 2
    made = run.stage_folder("generate")
    assert {p.name for p in made.iterdir() if p.is_dir()} == {"chat", "chat-instructions"}
    assert (made / "held_out.json").exists()
    assert rows_of_code(made) == 3
    (aside,) = run.folder.glob(".generate.partial-*")
    assert {p.name for p in aside.iterdir()} == {"code", "config.yaml"}
    assert rows_of_code(aside) == 4


@pytest.mark.parametrize("change", ["seed=1", "generate.batch_size=3", "generate.sets.chat.rows=3"])
def test_nothing_stays_where_all_sets_have_to_be_made_again(
    fakes: FakeStages, make_run: Callable[..., Run], change: str
) -> None:
    begin_generate(fakes, make_run())
    run = make_run(change)
    execute(run, ["generate"])
    assert record(run, "generate")["runs"] == 1
    assert not (run.stage_folder("generate") / "chat" / "part-00000.parquet").exists()
    (aside,) = run.folder.glob(".generate.partial-*")
    assert (aside / "chat" / "part-00000.parquet").exists()


def test_killed_while_it_moves_what_changed(
    fakes: FakeStages, make_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    two = "generate.sets.code={kind: code, rows: 4}"
    partial = begin_generate(fakes, make_run(two))
    (partial / "another").mkdir()
    rename = Path.rename

    def killed_after_one(path: Path, to: Path) -> Path:
        if path.name == "code":
            raise Killed
        return rename(path, to)

    fewer = make_run("generate.sets.code={kind: code, rows: 3}")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killed_after_one)
        with pytest.raises(Killed):
            execute(fewer, ["generate"])
    assert not (partial / "another").exists()
    assert (partial / "code").exists()
    execute(fewer, ["generate"])
    assert (fewer.stage_folder("generate") / "chat" / "part-00000.parquet").exists()
    assert not (fewer.stage_folder("generate") / "code").exists()


def test_a_setting_newer_than_a_partial_folder_had_its_default(
    fakes: FakeStages, make_run: Callable[..., Run]
) -> None:
    fakes.killed = {"align"}
    with pytest.raises(Killed):
        run_all(make_run())
    fakes.killed = set()
    run = make_run()
    path = run.folder / ".align.partial" / "config.yaml"
    whole = path.read_text(encoding="utf-8")
    made = yaml.safe_load(whole)
    del made["align"]["warmup_steps"]
    path.write_text(yaml.safe_dump(made), encoding="utf-8")
    run_all(run)
    assert record(run, "align")["runs"] == 2  # it went on
    assert (run.stage_folder("align") / "config.yaml").read_text(encoding="utf-8") == whole


MORE = "generate.sets.chat.rows=6"
ANOTHER = "generate.sets.more={rows: 2}"


@pytest.mark.parametrize("change", [MORE, ANOTHER])
@pytest.mark.parametrize("killed", [False, True])
def test_a_stage_that_is_asked_for_more_goes_on(
    fakes: FakeStages, make_run: Callable[..., Run], change: str, killed: bool
) -> None:
    execute(make_run(), ["design", "generate"])
    before = record(make_run(), "generate")
    run = make_run(change)
    assert grows(run, "generate")
    if killed:
        fakes.killed = {"generate"}
        with pytest.raises(Killed):
            run_all(run)
        assert names(run) == {"design", ".generate.partial", ".lock"}
        fakes.killed.clear()
    run_all(make_run(change))
    after = record(run, "generate")
    # One line of each time it ran, in the same folder.
    assert after["facts"] == {"rows": 3 if killed else 2}
    assert after["runs"] == (3 if killed else 2)
    assert after["wall_seconds"] >= before["wall_seconds"]
    assert after["id"] != before["id"]
    assert fakes.calls.count("design") == 1
    assert not grows(run, "generate")
    made = yaml.safe_load((run.stage_folder("generate") / "config.yaml").read_text())
    assert made["generate"]["sets"].keys() == run.recipe.resolved()["generate"]["sets"].keys()
    assert names(run) == {"design", "generate", "align", "evaluate", "draft", ".lock"}


def test_what_was_begun_goes_on_when_more_is_asked_for(
    fakes: FakeStages, make_run: Callable[..., Run]
) -> None:
    fakes.killed = {"generate"}
    with pytest.raises(Killed):
        execute(make_run(), ["generate"])
    fakes.killed.clear()
    execute(make_run(MORE, ANOTHER), ["generate"])
    assert record(make_run(), "generate")["facts"] == {"rows": 2}


@pytest.mark.parametrize(
    "change",
    [
        "generate.sets.chat.rows=3",
        "generate.sets={chat: {rows: 4, samples: 2}}",
        "generate.sets.chat={rows: 6, max_new_tokens: 9}",
        "generate.sets.chat={rows: 6, max_minutes: 5}",
        "seed=1",
    ],
)
def test_other_changes_are_not_more(make_run: Callable[..., Run], change: str) -> None:
    execute(make_run(), ["design", "generate"])
    run = make_run(change, *([] if "sets" in change else [MORE]))
    assert not grows(run, "generate")
    with pytest.raises(FastDraftError, match="generate was made with other settings"):
        execute(run, ["generate"])


def test_a_set_that_is_gone_is_not_kept() -> None:
    chat = {"rows": 4, "max_minutes": None, "kind": "free"}
    assert "a" in unchanged({"sets": {"a": chat}}, {"sets": {"b": chat, "a": chat}})
    assert unchanged({"sets": {"a": chat}}, {"sets": {"b": chat}}) == []


def test_what_was_made_from_less_is_named_before_any_work(
    fakes: FakeStages, make_run: Callable[..., Run]
) -> None:
    run_all(make_run())
    run = make_run(MORE)
    calls = list(fakes.calls)
    with pytest.raises(FastDraftError, match="generate must be extended") as caught:
        run_all(run)
    folders = [str(run.stage_folder(name)) for name in ("align", "evaluate", "card")]
    assert ", ".join(folders) in str(caught.value)
    assert str(run.stage_folder("design")) not in str(caught.value)
    assert fakes.calls == calls
    assert record(run, "generate")["facts"] == {"rows": 1}
    for folder in folders:
        shutil.rmtree(folder)
    run_all(run)
    assert record(run, "generate")["facts"] == {"rows": 2}


def test_a_stage_that_reads_no_generated_text_does_not_wait_for_it(
    fakes: FakeStages, make_run: Callable[..., Run]
) -> None:
    python = "pretrain={sources: [{kind: python}]}"
    execute(make_run(python), ["design", "pretrain"])
    assert fakes.calls == ["design", "pretrain"]
    assert list(record(make_run(), "pretrain")["inputs"]) == ["design"]
    run_all(make_run(python))
    assert fakes.calls.count("pretrain") == 1
    with pytest.raises(FastDraftError, match=r"inputs\.generate: None then"):
        run_all(make_run("pretrain={sources: [{name: chat}]}"))


def test_temporary_files_of_a_kill_are_not_published(
    fakes: FakeStages, make_run: Callable[..., Run]
) -> None:
    """A kill inside an atomic write leaves its temporary file or folder beside the target."""
    run = make_run()
    fakes.killed = {"align"}
    with pytest.raises(Killed):
        run_all(run)
    partial = run.folder / ".align.partial"
    (partial / ".sessions.json.abc123.tmp").write_text("torn", encoding="utf-8")
    (partial / ".model.xyz789.tmp").mkdir()
    (partial / ".model.xyz789.tmp" / "weights").write_text("torn", encoding="utf-8")
    fakes.killed = set()
    run_all(run)
    left = [path.name for path in run.stage_folder("align").rglob("*.tmp")]
    assert left == []


def test_a_folder_that_no_stage_finished_is_refused(
    fakes: FakeStages, make_run: Callable[..., Run]
) -> None:
    run = make_run()
    run.stage_folder("align").mkdir(parents=True)
    with pytest.raises(FastDraftError, match="align exists and was not made by a finished stage"):
        run_all(run)
    assert fakes.calls == []


def test_a_missing_input_is_refused(fakes: FakeStages, make_run: Callable[..., Run]) -> None:
    run = make_run()
    with pytest.raises(FastDraftError, match="stage align reads the output of generate"):
        execute(run, ["align"])
    assert fakes.calls == []
    assert names(run) <= {".lock"}


def test_stages_are_chosen_in_the_recipes_order(make_run: Callable[..., Run]) -> None:
    recipe = make_run().recipe
    assert choose(recipe, None) == ORDER
    assert choose(recipe, ["align", "design"]) == ["design", "align"]
    with pytest.raises(FastDraftError, match=r"no stage 'alin' \(did you mean 'align'\?\); stag"):
        choose(recipe, ["alin"])
    with pytest.raises(FastDraftError, match="the recipe has no section 'pretrain'"):
        choose(recipe, ["pretrain"])


def test_a_second_process_is_refused(
    fakes: FakeStages, make_run: Callable[..., Run], tmp_path: Path
) -> None:
    run = make_run()
    run.folder.mkdir()
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys, filelock\n"
            "with filelock.FileLock(sys.argv[1]):\n"
            "    print('held', flush=True); sys.stdin.read()",
            str(run.folder / ".lock"),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(FastDraftError, match="another fastdraft process works in"):
            run_all(run)
        assert fakes.calls == []
    finally:
        holder.kill()
        holder.wait()
    run_all(run)  # a killed process lets go
    assert fakes.calls == ORDER


def test_the_latest_model_is_the_last_trained(
    fakes: FakeStages, make_run: Callable[..., Run]
) -> None:
    run = make_run()
    with pytest.raises(FastDraftError, match="stage align is not finished"):
        run.latest_model()
    with pytest.raises(FastDraftError, match="holds no draft yet; run stage design first"):
        run.latest_model(before="align")
    execute(run, ["design", "generate"])
    assert run.latest_model(before="align") == run.folder / "design"
    with pytest.raises(FastDraftError, match="stage align is not finished"):
        run.latest_model()  # an untrained draft is never taken for a trained one
    execute(run, ["align"])
    assert run.latest_model() == run.folder / "align"
    assert run.latest_model(before="evaluate") == run.folder / "align"


def test_the_target_is_asked_for_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str | None]] = []

    def resolve(name: str, revision: str | None) -> Target:
        asked.append((name, revision))
        return Target(tmp_path, name, revision)

    monkeypatch.setattr(module, "resolve_target", resolve)
    run = Run(build_recipe({"target": "a/b", "target_revision": "v1"}), tmp_path)
    assert asked == []
    assert run.target is run.target
    assert asked == [("a/b", "v1")]
