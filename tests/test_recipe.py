import datetime
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from fastdraft_hf import FastDraftError
from fastdraft_hf.data.task_sets import KNOWN
from fastdraft_hf.recipe import (
    Recipe,
    build_recipe,
    read_recipe,
    recipe_schema,
    resolve_device,
    sections,
)
from fastdraft_hf.train.config import DraftDistillationConfig
from fastdraft_hf.train.section import training_section

# fmt: off
KEYS = [
    "target", "target_revision", "chat_template_kwargs", "output_dir", "seed", "max_hours",
    "device", "design", "generate", "logits", "pretrain", "continue", "align", "reduced_vocabulary",
    "export", "evaluate", "bench", "card",
]
# fmt: on

# Nine levels of nine references each.
BOMB = b"a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + b"".join(
    b"a%d: &a%d [%s]\n" % (n, n, b", ".join([b"*a%d" % (n - 1)] * 9)) for n in range(1, 9)
)
PYTHON = {"sources": [{"kind": "python"}]}
CHAT = {"sets": {"chat": {"rows": 4}}}


def test_an_empty_mapping_is_a_recipe_of_defaults() -> None:
    recipe = build_recipe({})
    assert recipe.target == "embedded:smollm2-135m-instruct"
    assert recipe.generate is recipe.pretrain is recipe.continue_ is recipe.align is None
    assert list(recipe.resolved()) == KEYS


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"pretrain": {**PYTHON, "learning_rat": 1}}, "pretrain.learning_rat: unknown key (did "),
        ({"continue": {**PYTHON, "seq_lenght": 1}}, "continue.seq_lenght: unknown key (did you"),
        ({"desing": {}}, "desing: unknown key (did you mean 'design'?)"),
        ({"qqqqqq": {}}, "qqqqqq: unknown key; valid: target, "),
        ({"continue_": PYTHON}, "continue_: unknown key (did you mean 'continue'?)"),
        ({"design": {"params": "ten"}}, "design.params: expected a whole number, got 'ten'"),
        ({"design": {"params": float("inf")}}, "design.params: expected a whole number, got inf"),
        ({"evaluate": {"tasks": "humaneval"}}, "evaluate.tasks: expected a list"),
        ({"evaluate": {"tasks": ["humanevil"]}}, "evaluate.tasks: no task set 'humanevil'"),
        ({"evaluate": {"temperature": 0}}, "evaluate.temperature: at least one must be above 0"),
        ({"evaluate": {"temperature": []}}, "evaluate.temperature: the list is empty"),
        ({"evaluate": {"temperature": [0.6, -1]}}, "evaluate.temperature[1]: must be at least 0"),
        ({"evaluate": {"temperature": [0.6, float("nan")]}}, "evaluate.temperature[1]: expected"),
        ({"evaluate": {"temperature": "warm"}}, "evaluate.temperature: expected a number"),
        (
            {"evaluate": {"num_assistant_tokens": 0}},
            "evaluate.num_assistant_tokens: must be at least 1",
        ),
        (
            {"evaluate": {"num_assistant_tokens": [3, 3]}},
            "evaluate.num_assistant_tokens: a value is repeated",
        ),
        ({"evaluate": {"tasks": {}}}, "evaluate.tasks: at least one is needed"),
        (
            {"evaluate": {"tasks": {"mine": {"dataset": "gone.jsonl"}}}},
            "evaluate.tasks.mine.dataset: no such file or folder: gone.jsonl",
        ),
        ({"bench": {"num_assistant_tokens": [0]}}, "bench.num_assistant_tokens[0]: "),
        ({"bench": {"paths": ["openvin"]}}, "bench.paths[0]: 'openvin' is not one of "),
        ({"device": "tpu"}, "device: 'tpu' is not one of auto, cpu, cuda"),
        ({"pretrain": {}}, "pretrain.sources: at least one source is needed"),
        ({"pretrain": {"sources": [{"kind": "files"}]}}, "pretrain.sources[0].name: needed for"),
        (
            {"generate": CHAT, "align": {"sources": [{"name": "chatt"}]}},
            "align.sources[0].name: generate has no set 'chatt'; it has: chat",
        ),
        ({"align": {"sources": [{"name": "chat"}]}}, "has no set 'chat'; it has: none"),
        (
            {"pretrain": {"sources": [{"kind": "files", "name": "/nowhere/*.txt"}]}},
            "pretrain.sources[0].name: no file matches '/nowhere/*.txt'",
        ),
        (
            {"generate": CHAT, "align": {"sources": [{"name": "chat"}, {"kind": "python"}]}},
            "align.sources[1].kind: align reads generated sets only, not python",
        ),
        (
            {"generate": CHAT, "align": {"sources": [{"name": "chat"}], "streaming": True}},
            "align.streaming: for pretrain and continue only",
        ),
        (
            {"reduced_vocabulary": {}},
            "reduced_vocabulary: it counts the tokens of the generated sets, and the recipe has",
        ),
        (
            {"generate": CHAT, "reduced_vocabulary": {"sets": ["chatt"]}},
            "reduced_vocabulary.sets[0]: generate has no set 'chatt' (did you mean 'chat'?)",
        ),
        (
            {"generate": CHAT, "reduced_vocabulary": {"draft_vocab_size": 0}},
            "reduced_vocabulary.draft_vocab_size: must be at least 1",
        ),
        ({"generate": {"sets": {"a": {"rows": 0}}}}, "generate.sets.a.rows: must be at least 1"),
        ({"pretrain": {**PYTHON, "max_train_tokens": 9}}, "pretrain.max_train_tokens: 9 is below"),
        ({"generate": {"sets": {"a": {"kind": "traffic"}}}}, "a.dataset: kind traffic needs"),
        ({"generate": {"sets": {"a": {"model": "m"}}}}, "a.model: only for kind traffic"),
        (
            {
                "generate": {
                    "sets": {"a": {"kind": "traffic", "dataset": "l", "drop_patterns": ["("]}}
                }
            },
            "generate.sets.a.drop_patterns: '(' is no pattern",
        ),
        ({"bench": {"tasks": {"t": {"kind": "traffic", "words": 3}}}}, "t.words: not of kind traf"),
        ({"card": {"license": "apache"}}, "card.license: the Hub has no license 'apache'"),
        ({"card": {"base_model": "a/b/c"}}, "card.base_model: 'a/b/c' is not a repository id"),
        ({"card": {"language": ["english"]}}, "card.language: 'english' is not a language code"),
        ({"target": "models/a\nb"}, "target: 'models/a\\nb' has a control character"),
        ({"when": {"gpu": {}}}, "when.gpu: unknown machine; valid: cpu, cuda"),
        ({"when": [1]}, "when: expected a mapping"),
        ({"when": {"cpu": [1]}, "device": "cpu"}, "when.cpu: expected a mapping"),
        ({"when": {"cpu": {"desing.params": 1}}, "device": "cpu"}, "desing: unknown key (did you"),
    ],
)
def test_an_error_names_the_key(data: dict[str, Any], message: str) -> None:
    with pytest.raises(FastDraftError) as caught:
        build_recipe(data)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("learning_rate", NAN), ("learning_rate", INF), ("weight_decay", ".inf")),
        *(("weight_decay", "nan"), ("warmup_steps", -1), ("max_grad_norm", NAN)),
        *(("max_grad_norm", -1.0), ("adam_beta1", 7), ("adam_beta2", -0.5), ("max_minutes", INF)),
        *(("label_smoothing_factor", 1.5), ("neftune_noise_alpha", INF), ("logging_steps", -3)),
        *(("save_total_limit", -2), ("dataloader_num_workers", -1), ("lora", {"lora_alpha": NAN})),
    ],
)
def test_a_number_that_no_training_can_have(key: str, value: Any) -> None:
    with pytest.raises(FastDraftError, match=rf"^pretrain\.{key}"):
        build_recipe({"pretrain": {**PYTHON, key: value}})
    if not isinstance(value, dict | str):
        with pytest.raises(ValueError, match=key):
            DraftDistillationConfig(output_dir="unused", use_cpu=True, **{key: value})


def test_overrides_reach_into_sections_and_lists() -> None:
    data = {"generate": CHAT, "pretrain": {"sources": [{"kind": "python"}, {"name": "chat"}]}}
    recipe = build_recipe(
        data,
        [
            "seed=7",
            "design.params=12M",
            "pretrain.sources.1.weight=2.5",
            "pretrain.learning_rate=1e-3",
            "generate.sets.chat.temperatures=[0.0, 1.0]",
            "generate.sets.more.rows=9",
            "evaluate.tasks=[ifbench]",
            "align.sources=[{name: more}]",
            "target=some/model=odd",
        ],
    )
    assert recipe.seed == 7
    assert recipe.design.params == 12_000_000
    assert recipe.pretrain is not None
    assert [s.weight for s in recipe.pretrain.sources] == [1.0, 2.5]
    assert recipe.pretrain.learning_rate == 0.001
    assert recipe.generate is not None
    assert recipe.generate.sets["chat"].temperatures == [0.0, 1.0]
    assert recipe.generate.sets["more"].rows == 9
    assert recipe.evaluate.tasks == ["ifbench"]
    assert recipe.align is not None
    assert recipe.align.sources[0].name == "more"
    assert recipe.target == "some/model=odd"
    assert data["pretrain"]["sources"][1] == {"name": "chat"}  # the given mapping is not changed


def test_null_leaves_a_set_out() -> None:
    data = {"generate": {"sets": {"text": {"kind": "free"}, "chat": {}}}}
    recipe = build_recipe(data, ["generate.sets.chat=null"])
    assert recipe.generate is not None
    assert list(recipe.generate.sets) == ["text"]


def test_what_a_stage_reads_is_written_out() -> None:
    recipe = build_recipe(
        {
            "generate": {"sets": {"text": {"kind": "free"}, "chat": {}}},
            "logits": {},
            "reduced_vocabulary": {"sets": ["text"]},
            "pretrain": {"sources": [{"kind": "hub", "name": "org/text"}]},
            "align": {"sources": [{"name": "chat"}, {"name": "chat"}]},
        }
    )
    resolved = recipe.resolved()
    assert resolved["logits"]["sets"] == ["chat"]
    assert resolved["reduced_vocabulary"]["sets"] == ["text"]
    assert recipe.training_stages()["pretrain"].streams
    assert build_recipe(resolved) == recipe
    log = {"kind": "traffic", "dataset": "log.jsonl", "model": "m"}
    tasks = {"own": {"kind": "traffic"}, "other": {"kind": "traffic", "dataset": "b.jsonl"}}
    read = build_recipe({"generate": {"sets": {"log": log}}, "bench": {"tasks": tasks}}).bench.tasks
    assert isinstance(read, dict)
    assert (read["own"].dataset, read["own"].model) == ("log.jsonl", "m")
    assert (read["other"].dataset, read["other"].model) == ("b.jsonl", None)
    recipe = build_recipe(recipe.resolved() | {"align": None, "reduced_vocabulary": {}})
    assert recipe.resolved()["reduced_vocabulary"]["sets"] == ["text", "chat"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed", "'seed' is not an override; write key.path=value"),
        ("=3", "'=3' is not an override"),
        ("seed=[1", "seed: '[1' is not a valid YAML value"),
        ("seed.deep=1", "seed.deep: cannot be set, 'seed' holds no keys"),
        ("seed.deep.er=1", "seed.deep: cannot be set, 'seed' holds no keys"),
        ("pretrain.sources.1.weight=2", "pretrain.sources.1: the list has entries 0 to 0"),
        ("pretrain.sources.x=2", "pretrain.sources.x: the list has entries 0 to 0"),
        ("pretrain.sources.-1.weight=2", "pretrain.sources.-1: the list has entries 0 to 0"),
        ("pretrain.sources.².weight=2", "pretrain.sources.²: the list has entries 0 to 0"),
        ("pretrain.sources.0.wieght=2", "pretrain.sources[0].wieght: unknown key (did you mean"),
        ("continue.sources=3", "continue.sources: expected a list"),
    ],
)
def test_a_bad_override_is_named(override: str, message: str) -> None:
    with pytest.raises(FastDraftError) as caught:
        build_recipe({"seed": 1, "pretrain": PYTHON}, [override])
    assert message in str(caught.value)


class TestWhen:
    DATA = {
        "seed": 1,
        "pretrain": PYTHON,
        "when": {
            "cuda": {"pretrain.max_train_tokens": "5M", "seed": 2},
            "cpu": {"pretrain.max_train_tokens": "1M", "pretrain.sources.0.weight": 3},
        },
    }

    @pytest.mark.parametrize(("device", "tokens"), [("cpu", 10**6), ("cuda", 5 * 10**6)])
    def test_the_given_device_decides(self, device: str, tokens: int) -> None:
        recipe = build_recipe({**self.DATA, "device": device})
        assert recipe.pretrain is not None
        assert recipe.pretrain.max_train_tokens == tokens
        assert recipe.seed == (2 if device == "cuda" else 1)
        assert recipe.pretrain.sources[0].weight == (3 if device == "cpu" else 1)
        assert "when" not in recipe.resolved()

    @pytest.mark.parametrize(("has_cuda", "seed"), [(True, 2), (False, 1)])
    def test_auto_asks_the_machine(
        self, has_cuda: bool, seed: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("torch.cuda.is_available", lambda: has_cuda)
        assert build_recipe(self.DATA).seed == seed
        assert resolve_device("auto") == ("cuda" if has_cuda else "cpu")

    def test_an_override_chooses_the_device_and_comes_last(self) -> None:
        recipe = build_recipe({**self.DATA, "device": "cpu"}, ["device=cuda", "seed=9"])
        assert recipe.pretrain is not None
        assert (recipe.seed, recipe.pretrain.max_train_tokens) == (9, 5 * 10**6)


def test_continue_is_the_key_of_the_files(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("continue: {sources: [{kind: python}], max_length: 64}\n", encoding="utf-8")
    recipe = read_recipe(path, ["continue.warmup_steps=0.5"])
    assert recipe.continue_ is not None
    assert (recipe.continue_.max_length, recipe.continue_.warmup_steps) == (64, 0.5)
    resolved = recipe.resolved()
    assert resolved["continue"]["max_length"] == 64
    assert "continue_" not in resolved


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"- 1\n", "a recipe is a mapping of keys"),
        (b"", "a recipe is a mapping of keys"),
        (b"a: [1\n", "is not valid YAML: "),
        (b"a: \x00\n", "is not valid YAML: "),
        (b"target: caf\xe9\n", "recipe.yaml is not UTF-8 text"),  # Latin-1
        ("seed: 1\n".encode("utf-16"), "is not UTF-8 text"),
        (b"\x89PNG\r\n\x1a\n\0\0", "is not UTF-8 text"),
        (b"7\n", "a recipe is a mapping of keys"),
        (b"#" * 1_000_001, "larger than 1,000,000 bytes"),
        (b"seed: 1\ndesign: {}\nseed: 2\n", "line 3: key 'seed' is repeated"),
        (b"pretrain:\n  sources: [{name: a, name: b}]\n", "line 2: key 'name' is repeated"),
        (b"a: [1]\nb: {2: 1, '2': 1}\n", "line 2: key '2' is repeated"),
        (BOMB, "more than 100,000 values, its anchors written out"),
        (b"a: &a [*a]\n", "more than 100,000 values"),
        (b"a: &a {<<: *a}\n", "more than 100,000 values"),
        (b"a: " + b"[" * 100_000, "nested more than 32 levels deep"),
        (b"a: " + b"{b: " * 40 + b"1" + b"}" * 40, "nested more than 32 levels deep"),
        (b"seed: " + b"9" * 5000, "is not valid YAML: "),
        (b"seed: 0x" + b"f" * 5000, "seed: expected a whole number, got 0xfff"),
        (b"seed: 1" + b"0" * 30, "seed: expected a whole number, got 0x"),
        (b"seed: 2001-99-99\n", "is not valid YAML: "),
        (b"seed: 2001-09-09\n", "seed: expected a whole number"),
        (b"seed: !!timestamp x\n", "is not valid YAML: "),
        (b"seed: !!bool maybe\n", "is not valid YAML: "),
        (b"seed: !!python/object/apply:os.system [x]\n", "could not determine a constructor"),
        (b"? [a]\n: 1\n", "is not valid YAML: "),
        (b"seed: !!set {a}\n", "seed: expected a whole number"),
        (b"seed: -1\n", "seed: must be at least 0, got -1"),
        (b"generate: {server: 'http://[::1'}\n", "generate.server: 'http://[::1' is not a URL"),
        (b"generate: {server: 'http://h:99999'}\n", "generate.server: 'http://h:99999' is not"),
    ],
    ids=range(30),
)
def test_a_file_that_is_not_a_recipe(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    with pytest.raises(FastDraftError) as caught:
        read_recipe(path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


ODD: list[Any] = [
    *(float("nan"), float("inf"), -1, 0, 10**30, 1e300, True, "x" * 1000, "nan", "\0", b"x", ""),
    *([], {}, [None], {1: 2}, [[[]]], datetime.date(2001, 1, 1), {"a": {"b": []}}),
]


@pytest.mark.parametrize("name", [None, *sections()])
def test_an_odd_value_is_accepted_or_named(name: str | None) -> None:
    needed = PYTHON if name in ("pretrain", "continue") else {}
    for key in (sections()[name] if name else Recipe).model_fields:
        for odd in ODD:
            section, said = {**needed, key: odd}, ""
            try:
                recipe = build_recipe({name: section} if name else section)
                yaml.safe_load(yaml.safe_dump(recipe.resolved()))
            except FastDraftError as error:
                said = str(error)
            assert "\n" not in said
            assert len(said) < 3000


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FastDraftError, match=r"the recipe file .*none\.yaml does not exist"):
        read_recipe(tmp_path / "none.yaml")


TRAIN = st.fixed_dictionaries(
    {"sources": st.just([{"kind": "python"}])},
    optional={
        "max_length": st.integers(1, 512),
        "max_train_tokens": st.integers(4096, 10**12) | st.sampled_from(["50M", "1.5k", "5B"]),
        "learning_rate": st.floats(1e-9, 1) | st.sampled_from(["1e-3", "2E-4"]),
        "max_minutes": st.none() | st.floats(0.1, 1e4),
        "use_muon": st.booleans(),
        "report_to": st.sampled_from(["none", "tensorboard", ["tensorboard", "wandb"]]),
        "lr_scheduler_kwargs": st.dictionaries(
            st.text(min_size=1), st.integers() | st.text() | st.booleans()
        ),
    },
)
TASK_SET = st.fixed_dictionaries(
    {"dataset": st.sampled_from(["org/set", "squad"])},
    optional={
        "column": st.text(min_size=1),
        "instruction": st.sampled_from(["{}", "Say:\n\n{}", "{} {other}"]),
        "rows": st.integers(1, 10**6) | st.just("2k"),
        "revision": st.none() | st.text(),
    },
)
TASKS = st.lists(st.sampled_from(KNOWN), min_size=1) | st.dictionaries(
    st.text("abc.-_", min_size=1), TASK_SET, min_size=1
)
EVALUATE = st.fixed_dictionaries(
    {},
    optional={
        "tasks": TASKS,
        "num_assistant_tokens": st.integers(1, 9)
        | st.lists(st.integers(1, 9), min_size=1, unique=True),
        "temperature": st.floats(0.1, 4)
        | st.lists(st.sampled_from([0, 0.6, 1]), min_size=1, unique=True).filter(any),
    },
)
NAME = st.text(st.characters(exclude_categories=("C", "Z")))
DATA = st.fixed_dictionaries(
    {},
    optional={
        "evaluate": EVALUATE,
        "target": NAME,
        "output_dir": NAME,
        "seed": st.integers(0, 2**31),
        "device": st.sampled_from(["auto", "cpu", "cuda"]),
        "design": st.none() | st.fixed_dictionaries({}, optional={"params": st.integers(1, 10**9)}),
        "pretrain": st.none() | TRAIN,
        "continue": st.none() | TRAIN,
        "bench": st.fixed_dictionaries(
            {"num_assistant_tokens": st.lists(st.integers(1, 9), min_size=1, unique=True)},
            optional={"tasks": TASKS},
        ),
        "card": st.fixed_dictionaries({"model_name": st.none() | NAME}),
    },
)


@given(DATA)
def test_a_resolved_recipe_builds_itself_again(data: dict[str, Any]) -> None:
    recipe = build_recipe(data)
    resolved = recipe.resolved()
    # Through YAML, because that is how it is kept beside every stage.
    assert build_recipe(yaml.safe_load(yaml.safe_dump(resolved, sort_keys=False))) == recipe
    assert recipe.resolved() == resolved
    for key in ("target", "seed", "device"):
        assert resolved[key] == data.get(key, resolved[key])


def test_the_schema_has_every_key_and_no_other() -> None:
    schema = recipe_schema()
    assert set(schema["properties"]) == {*KEYS, "when"}
    assert "required" not in schema  # everything has a default

    def check(node: Any, path: str) -> int:
        """Every object with fixed keys refuses others, and every key says what it is."""
        if isinstance(node, list):
            return sum(check(item, path) for item in node)
        if not isinstance(node, dict):
            return 0
        found = 0
        if "properties" in node:
            found = 1
            assert node["additionalProperties"] is False, path
            if not path.endswith("when"):
                for name, value in node["properties"].items():
                    assert value.get("description"), f"{path}.{name}"
        for name, value in node.items():
            if name not in ("default", "description", "enum"):
                found += check(value, f"{path}.{name}")
        return found

    # The recipe, `when`, ten sections, and the sets and sources within them.
    assert check(schema, "") >= 14
    train = schema["$defs"]["TrainingSection"]["properties"]
    assert train["learning_rate"]["default"] == training_section()().learning_rate
