"""Stage logits and what align does with it: real stages on a tiny target, killed in the middle."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
from transformers import AutoModelForCausalLM

from fastdraft_hf import FastDraftError
from fastdraft_hf.data import columns, parts, target_logits
from fastdraft_hf.data.filters import iter_kept_rows
from fastdraft_hf.data.parts import iter_rows, read_part
from fastdraft_hf.recipe import (
    build_recipe,
    distribution_source,
)
from fastdraft_hf.stages import logits
from fastdraft_hf.stages.runner import Run, choose, execute
from fastdraft_hf.target.resolve import Target
from fastdraft_hf.train import config as training_config
from fastdraft_hf.train import loop

Make = Callable[..., Any]
LENGTH = 14

RECIPE: dict[str, Any] = {
    "device": "cpu",
    "seed": 3,
    "design": {"hidden_size": 16, "num_hidden_layers": 1, "params": "1k"},
    "generate": {
        "engine": "transformers",
        "sets": {
            # Greedy rows of one prompt are one another's duplicates, and long ones are cut.
            "text": {"kind": "free", "rows": 18, "max_new_tokens": 20, "temperatures": [1.0, 0.0]},
            "more": {"kind": "free", "rows": 9, "max_new_tokens": 9, "temperatures": [2.0]},
        },
    },
    "logits": {"engine": "transformers", "top_k": 6},
    "align": {
        "sources": [{"name": "text"}, {"name": "more"}],
        "objective": {"ce": 0.5, "kl": 0.5},
        "max_train_tokens": 600,
        "max_length": LENGTH,
        "per_device_train_batch_size": 4,
        "eval_rows": 3,
        "logging_steps": 1,
        "save_steps": 3,
        "disable_tqdm": True,
        "head_dtype": "float32",
    },
}


class Killed(BaseException):
    """Stands for a kill inside a stage; nothing of ours catches it."""


@pytest.fixture(scope="module", autouse=True)
def _small_parts() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "ROWS_PER_PART", 4)
        patch.setattr(target_logits, "BATCH_TOKENS", 64)
        yield


@pytest.fixture(autouse=True)
def _in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    # A CPU that multiplies bfloat16 would read in it, and be compared with float32.
    monkeypatch.setattr(training_config, "has_fast_bf16", lambda device: False)


def make_run(folder: Path, target: Path, *overrides: str, **sections: Any) -> Run:
    recipe = build_recipe({**RECIPE, **sections}, overrides)
    return Run(recipe, folder, Target(target, "tiny"))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory, tiny_target_folder: Path) -> Path:
    """A run with a design and generated sets; copy it."""
    folder = tmp_path_factory.mktemp("written") / "run"
    execute(make_run(folder, tiny_target_folder), ["design", "generate"])
    return folder


@pytest.fixture
def run(written: Path, tiny_target_folder: Path, tmp_path: Path) -> Callable[..., Run]:
    def make(*overrides: str, **sections: Any) -> Run:
        if not (tmp_path / "run").exists():
            shutil.copytree(written, tmp_path / "run")
        return make_run(tmp_path / "run", tiny_target_folder, *overrides, **sections)

    return make


@pytest.fixture
def seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the training loop was given; the datasets are copied, as the stage removes them."""
    kept: dict[str, Any] = {}
    real = loop.train

    def train(*args: Any, **kwargs: Any) -> Any:
        kept.update(kwargs, data=tmp_path / "kept")
        shutil.rmtree(kept["data"], ignore_errors=True)
        for name in ("train", "eval"):
            if kwargs[f"{name}_dataset"] is not None:
                kwargs[f"{name}_dataset"].save_to_disk(str(kept["data"] / name))
        return real(*args, **kwargs)

    monkeypatch.setattr(loop, "train", train)
    return kept


def check_rows(data: Path, stored: Path) -> tuple[int, int]:
    """Check that every row has the distribution that was stored for it; count all and long ones."""
    sources = {
        tuple(row["input_ids"]): row
        for name in ("text", "more")
        for row in iter_rows(stored / name)
    }
    rows = [row for part in ("eval", "train") for row in datasets.load_from_disk(str(data / part))]
    for row in rows:
        assert row.items() <= sources[tuple(row["input_ids"])].items()
        assert columns.IDS in row
    return len(rows), sum(len(row["input_ids"]) > LENGTH for row in rows)


def test_a_run_killed_in_logits_aligns_on_the_right_distributions(
    run: Callable[..., Run],
    seen: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = run()
    assert choose(made.recipe, None)[:4] == ["design", "generate", "logits", "align"]
    stages = ["logits", "align"]
    real, read = target_logits._stored_table, list[int]()

    def counted(reader: Any, rows: Any, *args: Any) -> Any:
        if kill and len(read) >= 8:
            raise Killed
        read.extend(row["index"] for row in rows)
        return real(reader, rows, *args)

    monkeypatch.setattr(target_logits, "_stored_table", counted)
    kill = True
    with pytest.raises(Killed):
        execute(made, stages)
    kill, done = False, len(read)
    execute(run(), stages)
    generated = made.stage_folder("generate")
    written = {name: list(iter_kept_rows(generated / name)) for name in ("text", "more")}
    rows = sum(map(len, written.values()))
    assert rows < 18 + 9  # the greedy rows are duplicates, and cost nothing
    assert 8 <= done < rows
    assert len(read) == rows  # no row is read twice

    folder = made.stage_folder("logits")
    record = json.loads((folder / "provenance.json").read_text(encoding="utf-8"))
    assert record["runs"] == 2
    assert {name: facts["rows"] for name, facts in record["facts"]["sets"].items()} == {
        name: len(rows) for name, rows in written.items()
    }
    assert record["facts"]["dtype"] == "float32"

    # Filtered, shuffled, cut, split into two sets: and every row has its own numbers.
    count, cut = check_rows(seen["data"], made.stage_folder("logits"))
    assert seen["teacher"] is None
    assert 12 < count < 18 + 9  # the greedy rows are one
    assert 5 < cut < count
    facts = json.loads((made.stage_folder("align") / "provenance.json").read_text())["facts"]
    assert facts["objective"] == {"ce": 0.5, "kl": 0.5}
    assert facts["tokens"] >= 600
    log = json.loads((made.stage_folder("align") / "log.json").read_text(encoding="utf-8"))
    steps = [entry for entry in log if "loss" in entry]
    for entry in steps:
        assert entry["loss"] == pytest.approx((entry["ce"] + entry["kl"]) / 2, rel=1e-3)
        assert 0 < entry["expected_acceptance"] < 1
    assert steps[-1]["kl"] < steps[0]["kl"]
    assert any("eval_kl" in entry for entry in log)
    AutoModelForCausalLM.from_pretrained(made.stage_folder("align"))


def test_stored_and_online_align_alike(
    run: Callable[..., Run], seen: dict[str, Any], tmp_path: Path
) -> None:
    """All 288 tokens stored are the target itself, up to float16."""
    losses = []
    for source, overrides in (("stored", ["logits.top_k=288"]), ("online", [])):
        made = run("align.objective=kl", f"align.target_distribution={source}", *overrides)
        for stage in ("logits", "align"):
            shutil.rmtree(made.stage_folder(stage), ignore_errors=True)
        execute(made, ["logits", "align"])
        log = json.loads((made.stage_folder("align") / "log.json").read_text(encoding="utf-8"))
        losses.append([entry["loss"] for entry in log if "loss" in entry])
        assert (seen["teacher"] is None) == (source == "stored")
    assert losses[0] == pytest.approx(losses[1], rel=5e-3)


def test_a_deleted_part_is_made_again_and_a_grown_set_is_continued(
    run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = run()
    execute(made, ["logits"])
    generated, stored = made.stage_folder("generate"), made.stage_folder("logits")
    before = list(iter_rows(generated / "more")), list(iter_rows(stored / "more"))
    read: list[int] = []
    real = target_logits._stored_table

    def counted(reader: Any, rows: Any, *args: Any) -> Any:
        read.extend(row["index"] for row in rows)
        return real(reader, rows, *args)

    monkeypatch.setattr(target_logits, "_stored_table", counted)
    # Of generate: its rows are made again, and nothing after it has to be.
    part = next((generated / "more").glob("*.parquet"))
    part.write_bytes(part.read_bytes()[:-9])
    with pytest.raises(FastDraftError, match=r"damaged \(.*Delete this file and run again"):
        execute(run(), ["generate", "logits"])
    part.unlink()
    execute(run(), ["generate", "logits"])
    assert list(iter_rows(generated / "more")) == before[0]
    assert read == []
    # Of logits.
    part = next((stored / "more").glob("*.parquet"))
    lost = read_part(part)["index"].to_pylist()
    part.unlink()
    execute(run(), ["generate", "logits"])
    assert sorted(read) == sorted(lost)
    assert list(iter_rows(stored / "more")) == before[1]
    # A larger set: only its new rows are read.
    read.clear()
    execute(run("generate.sets.more.rows=12"), ["generate", "logits"])
    assert read
    assert all(index >= 9 for index in read)
    assert list(iter_rows(stored / "more"))[: len(before[1])] == before[1]


# ------------------------------------------------------------------ where a distribution is from

SETS = {"sets": {"text": {"rows": 4}, "more": {"rows": 4}}}
PYTHON = {"sources": [{"kind": "python"}]}
TEXT = {"sources": [{"name": "text"}]}


@pytest.mark.parametrize(
    ("objective", "asked", "logits", "align", "pretrain"),
    [
        ("ce", "auto", {}, "none", "none"),
        ("kl", "auto", None, "online", "online"),
        ("kl", "auto", {}, "stored", "online"),
        ({"ce": 0.5, "tvd": 0.5}, "auto", {}, "stored", "online"),
        ("ce", "online", {}, "online", "online"),
        ("ce", "stored", {}, "stored", None),
        ("kl", "stored", {}, "stored", None),
    ],
)
def test_where_the_distribution_comes_from(
    objective: Any, asked: str, logits: Any, align: str, pretrain: str | None
) -> None:
    stage = {"objective": objective, "target_distribution": asked}
    data = {"generate": SETS, "logits": logits, "align": {**TEXT, **stage}}
    if pretrain is not None:
        data["pretrain"] = data["continue"] = {**PYTHON, **stage}
    recipe = build_recipe(data)
    assert distribution_source(recipe, "align") == align
    if pretrain is not None:
        assert distribution_source(recipe, "pretrain") == pretrain
        assert distribution_source(recipe, "continue") == pretrain


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            {"align": {**TEXT, "objective": "kl", "target_distribution": "none"}},
            "align.target_distribution: none, but objective kl needs the target's distribution",
        ),
        (
            {"pretrain": {**PYTHON, "objective": {"kl": 1.0}, "target_distribution": "none"}},
            "pretrain.target_distribution: none, but objective {'kl': 1.0} needs the target's",
        ),
        (
            {"logits": {}, "continue": {**PYTHON, "target_distribution": "stored"}},
            "continue.target_distribution: stored distributions belong to the target's answers",
        ),
        (
            {"align": {**TEXT, "objective": "kl", "target_distribution": "stored"}},
            "align.target_distribution: stored, but the recipe has no section logits",
        ),
        (
            {"logits": {"temperature": 0.5}, "align": {**TEXT, "objective": "kl"}},
            "align.temperature: 1, but logits.temperature is 0.5; they must be the",
        ),
        (
            {"logits": {"sets": ["more"]}, "align": {**TEXT, "objective": "kl"}},
            "align.sources[0]: set 'text' is not among logits.sets",
        ),
        ({"logits": {"sets": ["mor"]}}, "logits.sets[0]: generate has no set 'mor' (did you mean"),
        ({"logits": {"temperature": 0}}, "logits.temperature: must be above 0, got 0"),
        ({"logits": {"engine": "server"}}, "logits.engine: server is generate.server's, which"),
        (
            {"logits": {"engine": "server", "temperature": 0.5}},
            "logits.temperature: a server returns the most probable tokens at temperature 1",
        ),
        (
            {"align": {**TEXT, "target_distribution": "offline"}},
            "align.target_distribution: 'offline' is not one of",
        ),
    ],
)
def test_what_a_recipe_cannot_say(data: dict[str, Any], message: str) -> None:
    with pytest.raises(FastDraftError) as caught:
        build_recipe({"generate": SETS, **data})
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


# -------------------------------------------------------------------------------- the real target


def test_openvino_reads_on_a_cpu_where_it_is_installed(run: Callable[..., Run]) -> None:
    pytest.importorskip("openvino")
    pytest.importorskip("optimum.intel")
    made = run(logits={"top_k": 6})
    execute(made, ["logits"])
    facts = json.loads((made.stage_folder("logits") / "provenance.json").read_text())["facts"]
    assert (facts["engine"], facts["dtype"]) == ("openvino", "float16")


def test_a_target_that_openvino_cannot_read(
    run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(target: Path) -> Any:
        raise NotImplementedError("no pages")

    monkeypatch.setattr(logits, "use_openvino", lambda *args: True)
    monkeypatch.setattr(logits, "_openvino_reader", refuse)
    made = run(logits={"top_k": 6, "engine": "openvino"})
    with pytest.raises(
        FastDraftError, match=r"logits\.engine: openvino cannot read this target: no"
    ):
        execute(made, ["logits"])
    made = run(logits={"top_k": 6})
    execute(made, ["logits"])
    assert "using transformers, as OpenVINO cannot read it: no pages" in caplog.text
    facts = json.loads((made.stage_folder("logits") / "provenance.json").read_text())["facts"]
    assert (facts["engine"], facts["dtype"]) == ("transformers", "float32")
