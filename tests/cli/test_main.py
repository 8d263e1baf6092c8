import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    PreTrainedTokenizerFast,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
)

import fastdraft_hf
from fastdraft_hf.cli import main as cli
from fastdraft_hf.cli.main import COMMANDS
from fastdraft_hf.recipe import build_recipe
from fastdraft_hf.stages.runner import planned

ROOT = Path(__file__).resolve().parents[2]
FROM_NOTHING = ROOT / "recipes" / "smollm2-135m" / "from-nothing.yaml"
HEAVY = ("torch", "transformers", "trl", "openvino", "datasets", "numpy", "accelerate", "yaml")


@pytest.mark.parametrize(
    "words",
    [["--help"], ["--version"], ["run", "--help"], ["evaluate", "--help"]],
    ids=" ".join,
)
def test_asking_for_help_imports_nothing_heavy(words: list[str]) -> None:
    code = (
        "import sys\n"
        "from fastdraft_hf.cli.main import main\n"
        "try:\n"
        "    main(sys.argv[2:])\n"
        "except SystemExit as end:\n"
        "    assert end.code == 0, end.code\n"
        "loaded = [name for name in sys.argv[1].split(',') if name in sys.modules]\n"
        "assert not loaded, loaded\n"
    )
    heavy = HEAVY if words[0].startswith("-") else HEAVY[:-1]
    result = subprocess.run(
        [sys.executable, "-c", code, ",".join(heavy), *words], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr


def test_no_command_lists_every_command_and_the_first_step(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main([]) == 0
    shown = capsys.readouterr().out
    listed = [line.split()[0] for line in shown.splitlines() if line.startswith("    ")]
    assert [word for word in listed if word in COMMANDS] == list(COMMANDS)
    assert len(COMMANDS) <= 12
    assert "fastdraft run recipes/smollm2-135m/quickstart.yaml" in shown
    assert FROM_NOTHING.with_name("quickstart.yaml").is_file()


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main([name, "--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert f"fastdraft {name}" in text
    if name in ("evaluate", "bench"):
        for key in build_recipe({}).resolved()[name]:
            assert f"\n  {key} " in text, key


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run", "none.yaml"], "fastdraft: the recipe file none.yaml does not exist"),
        (["run", str(FROM_NOTHING), "align.logging_strategy=sometimes"], "sometimes"),
        (["run", str(FROM_NOTHING), "align.warmpu=1"], "align.warmpu: unknown key (did you mean"),
        (["run", str(FROM_NOTHING), "--stages", "alin"], "no stage 'alin' (did you mean 'align'?)"),
        (["run"], "give --target ORG/MODEL, a recipe file, the folder of a run, or settings such"),
        (["plan"], "give --target ORG/MODEL, a recipe file, the folder of a run, or settings such"),
        (["run", "--params", "50M"], "--params belongs to --target"),
        (["run", str(FROM_NOTHING), "--target", "A/B"], "--target: takes the place of a recipe"),
        (["run", "--hours", "0"], "max_hours: must be above 0, got 0"),
        (["run", "--target", "./none", "--dry-run"], "target: the folder none does not exist"),
        (["run", "."], ". is not the folder of a run: it holds no recipe.yaml"),
        (["run", "output_dir=x", "design.params=ten"], "design.params: expected a whole"),
        (["evaluate", "--target", "T", "--draft", "none"], "draft: "),
        (["schema", "algin"], "schema: no section 'algin' (did you mean 'align'?)"),
    ],
)
def test_bad_input_is_status_two(
    words: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(words) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_prints_the_recipe_and_creates_nothing(tmp_path: Path) -> None:
    words = ["output_dir=out", "seed=5", "align.max_train_tokens=300k", "--dry-run"]
    script = [sys.executable, "-m", "fastdraft_hf.cli.main", "run", str(FROM_NOTHING)]
    result = subprocess.run([*script, *words], capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    printed = yaml.safe_load(result.stdout)
    assert printed["seed"] == 5
    assert printed["align"]["max_train_tokens"] == 300_000
    assert build_recipe(printed).resolved() == printed
    # Libraries may warn on stderr as well, with lines of any form.
    states = re.findall(r"^  (\w+) +to do +\S+$", result.stderr, re.MULTILINE)
    assert states == planned(build_recipe(printed))
    assert "logits" not in states  # the recipe has no such section
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "order",
    [
        ["RECIPE", "seed=5", "--dry-run"],
        ["--dry-run", "RECIPE", "seed=5"],
        ["RECIPE", "output_dir=out", "--stages", "design", "seed=5", "--dry-run"],
    ],
    ids=" ".join,
)
def test_options_and_overrides_stand_in_any_order(
    order: list[str],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The help says ``RECIPE.yaml [--dry-run] [key=value ...]``."""
    monkeypatch.chdir(tmp_path)
    words = [str(FROM_NOTHING) if word == "RECIPE" else word for word in order]
    assert cli.main(["run", *words]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["seed"] == 5


def test_a_dry_run_tells_finished_from_started(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    tiny_target_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It does not read the target's weights, which takes seconds."""
    monkeypatch.setattr("fastdraft_hf.stages.provenance.target_weights", None)
    (tmp_path / "design").mkdir()
    (tmp_path / "design" / "model.safetensors").touch()
    (tmp_path / "design" / "provenance.json").write_text("{}", encoding="utf-8")
    (tmp_path / "design" / "config.yaml").write_text(f"target: {tiny_target_folder}\n")
    (tmp_path / ".generate.partial").mkdir()
    stages = "design,generate,align"
    words = [f"target={tiny_target_folder}", f"output_dir={tmp_path}", "--stages", stages]
    assert cli.main(["run", str(FROM_NOTHING), *words, "--dry-run"]) == 0
    lines = capsys.readouterr().err.splitlines()[2:]
    assert [line.split()[:2] for line in lines] == [
        ["design", "finished"],
        ["generate", "started"],
        ["align", "to"],
    ]


def test_settings_that_a_finished_stage_refuses_are_not_kept(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "design").mkdir()
    (tmp_path / "design" / "model.safetensors").touch()
    (tmp_path / "design" / "provenance.json").write_text('{"id": "design-1"}', encoding="utf-8")
    (tmp_path / "design" / "config.yaml").write_text("design: {params: 5}\n", encoding="utf-8")
    (tmp_path / "recipe.yaml").write_text("seed: 7\n", encoding="utf-8")
    words = ["run", str(tmp_path), "--stages", "design", "design.params=6"]
    assert cli.main(words) == 2
    assert "was made with other settings" in capsys.readouterr().err
    assert (tmp_path / "recipe.yaml").read_text(encoding="utf-8") == "seed: 7\n"


def test_the_folder_of_a_run_stands_for_its_recipe(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Also of one that was moved: its recipe names the old folder."""
    (tmp_path / "recipe.yaml").write_text("seed: 7\noutput_dir: elsewhere\n", encoding="utf-8")
    assert cli.main(["run", str(tmp_path), "--dry-run", "design.params=6M"]) == 0
    recipe = yaml.safe_load(capsys.readouterr().out)
    assert (recipe["seed"], recipe["output_dir"]) == (7, str(tmp_path))
    assert recipe["design"]["params"] == 6_000_000


@pytest.mark.parametrize("instructed", [True, False])
def test_a_target_alone_is_enough(
    instructed: bool,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    tiny_target_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The general recipe, cut to the hours; a base model is not asked for instructions."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_target_folder, tmp_path / "mine")
    if not instructed:
        (tmp_path / "mine" / "chat_template.jinja").unlink()
    words = ["run", "--target", "mine", "--params", "20k", "--dry-run", "seed=4"]
    assert cli.main([*words, "--hours", "0.5"]) == 0
    captured = capsys.readouterr()
    recipe = build_recipe(yaml.safe_load(captured.out))
    assert (recipe.target, recipe.output_dir, recipe.seed) == ("mine", "runs/mine", 4)
    sets = ["text", "chat", "code"] if instructed else ["text", "code"]
    assert [*recipe.generate.sets] == sets
    assert (0.0 in recipe.generate.sets["code"].temperatures) == instructed  # a base model loops
    assert {source.name for source in recipe.align.sources} <= {*recipe.generate.readable}
    assert re.search(r"draft: 2 layers of width \d+, .* read per token", captured.err)
    assert recipe.max_hours == 0.5
    tokens = recipe.align.max_train_tokens
    assert cli.main([*words, "--hours", "6"]) == 0
    longer = build_recipe(yaml.safe_load(capsys.readouterr().out))
    assert (longer.max_hours, longer.align.max_train_tokens) == (6, 2 * tokens)


def test_a_target_whose_cache_cannot_roll_back(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    """Qwen3.5: the draft of its text part is made, and not measured here."""
    text = dict.fromkeys(("head_dim", "linear_key_head_dim", "linear_value_head_dim"), 8)
    text |= dict.fromkeys(("num_attention_heads", "num_key_value_heads"), 4)
    text |= dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads"), 4)
    text |= {"hidden_size": 64, "intermediate_size": 96, "vocab_size": len(tiny_tokenizer)}
    text |= {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]}
    vision = dict.fromkeys(("hidden_size", "intermediate_size"), 16)
    vision |= {"depth": 1, "num_heads": 2, "out_hidden_size": 64}
    config = Qwen3_5Config(text_config=text, vision_config=vision)
    Qwen3_5ForConditionalGeneration(config).save_pretrained(tmp_path / "mine")
    tiny_tokenizer.save_pretrained(tmp_path / "mine")
    words = ["run", "--target", str(tmp_path / "mine"), f"output_dir={tmp_path / 'run'}"]
    assert cli.main([*words, "--stages", "design"]) == 0
    draft = AutoConfig.from_pretrained(tmp_path / "run" / "design")
    assert (draft.model_type, draft.layer_types) == ("qwen3", ["full_attention"] * 2)
    capsys.readouterr()
    assert cli.main([*words, "--dry-run"]) == 0
    said = capsys.readouterr().err
    assert "'qwen3_5' keep a state" in said
    assert "align" in said
    assert "evaluate   to do" not in said
    assert cli.main([*words, "--stages", "evaluate"]) == 2
    assert "so there is no evaluate here" in capsys.readouterr().err
    assert cli.main(["run", "target=" + words[2], words[3], "--stages", "design,card"]) == 0
    assert AutoConfig.from_pretrained(tmp_path / "run" / "draft").model_type == "qwen3"


def test_settings_alone_make_a_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    settings = ["target=org/model", "output_dir=none", "pretrain.sources=[{kind: python}]"]
    assert cli.main(["run", *settings, "--stages", "design,pretrain", "--dry-run"]) == 0
    captured = capsys.readouterr()
    recipe = build_recipe(yaml.safe_load(captured.out))
    assert recipe.target == "org/model"
    assert recipe.pretrain is not None
    planned = [line.split()[0] for line in captured.err.splitlines() if line.startswith("  ")]
    assert planned == ["design", "pretrain"]


@pytest.mark.parametrize(
    ("name", "stages"),
    [("evaluate", ["design", "evaluate"]), ("bench", ["design", "export", "bench"])],
)
def test_a_draft_is_measured_outside_a_run(
    name: str,
    stages: list[str],
    tiny_target_folder: Path,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    draft = tmp_path / "mine" / "draft"  # of a run
    shutil.copytree(tiny_target_folder, draft)
    words = [name, "--target", "org/model", "--draft", "mine", "--dry-run"]
    assert cli.main([*words, "max_new_tokens=9", "seed=3"]) == 0
    captured = capsys.readouterr()
    recipe = build_recipe(yaml.safe_load(captured.out))
    assert (recipe.target, recipe.seed) == ("org/model", 3)
    assert recipe.design.draft is not None
    assert (tmp_path / recipe.design.draft).resolve() == draft
    assert recipe.output_dir == "runs/model/mine-draft"
    assert getattr(recipe, name).max_new_tokens == 9
    planned = [line.split()[0] for line in captured.err.splitlines() if line.startswith("  ")]
    assert planned == stages


@pytest.mark.parametrize(
    ("stage", "results", "found"),
    [
        ("evaluate", "evaluation", r"humaneval +T = 0\.6 +3 +2 +0\.400 \(0\.300 to 0\.500\)"),
        ("evaluate", "evaluation", "identical to the target alone on 4 of 4 prompts"),
        ("bench", "bench", "the speed of the target alone through the same kernels"),
    ],
)
def test_what_was_measured_is_printed(
    stage: str,
    results: str,
    found: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Also of a stage that was finished before."""
    monkeypatch.setattr("fastdraft_hf.stages.runner.execute", lambda *args: None)
    monkeypatch.setattr("fastdraft_hf.stages.runner.grows", lambda *args: False)
    run = json.loads((ROOT / "tests" / "synthetic_run.json").read_text(encoding="utf-8"))
    (tmp_path / stage).mkdir()
    (tmp_path / stage / "results.json").write_text(json.dumps(run[results]), encoding="utf-8")
    words = ["run", f"output_dir={tmp_path}", "--stages", stage]
    cli.main(words)
    assert re.search(found, capsys.readouterr().err)
    cli.main([*words, "--dry-run"])
    assert not re.search(found, capsys.readouterr().err)


@pytest.mark.parametrize(("words", "gamma"), [([], 3), (["num_assistant_tokens=[5]"], 5)])
def test_bench_of_servers(
    words: list[str], gamma: int, tiny_target_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    urls = ["http://127.0.0.1:8000", "http://127.0.0.1:8001"]
    given = ["bench", "--target", "org/model", "--draft", str(tiny_target_folder), "--dry-run"]
    given += ["--engine", "vllm", "--server", urls[0]]
    assert cli.main([*given, *words]) == 2
    assert "bench.server_alone: paths vllm and llama.cpp need it" in capsys.readouterr().err
    assert cli.main([*given, "--server-alone", urls[1], *words]) == 0
    recipe = build_recipe(yaml.safe_load(capsys.readouterr().out))
    assert recipe.bench.paths == ["vllm"]
    assert [recipe.bench.server, recipe.bench.server_alone] == urls
    assert recipe.bench.num_assistant_tokens == [gamma]
    assert recipe.export.openvino == []


def test_the_schema_is_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    assert schema["additionalProperties"] is False
    assert "continue" in schema["properties"]


def test_the_settings_of_a_section(capsys: pytest.CaptureFixture[str]) -> None:
    for section, key in (("align", "learning_rate"), ("generate", "sets"), ("design", "params")):
        assert cli.main(["schema", section]) == 0
        assert f"\n  {key} " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (KeyboardInterrupt(), 130, "\nfastdraft: interrupted; the same command resumes\n"),
        (OSError(28, "No space left on device", "runs/x"), 1, "runs/x: No space left on device"),
        (OSError("two\nlines"), 1, "fastdraft: two lines\n"),
        (SafetensorError("No space left on device (os error 28)"), 1, "No space left on device"),
        (RuntimeError("PytorchStreamWriter failed writing file data/0"), 1, "failed writing file"),
        (ModuleNotFoundError("No module named 'gguf'"), 1, "fastdraft: No module named 'gguf'"),
        (fastdraft_hf.FastDraftError("x: hf_abcdefghijklmnopqrst"), 2, "fastdraft: x: [redacted]"),
    ],
)
def test_an_error_is_one_line(
    error: BaseException,
    status: int,
    line: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import fastdraft_hf.cli.schema as schema

    def failing(args: object) -> None:
        raise error

    monkeypatch.setattr(schema, "run", failing)
    assert cli.main(["schema"]) == status
    assert line in capsys.readouterr().err


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    import fastdraft_hf.cli.schema as schema

    def failing(args: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(schema, "run", failing)
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main(["schema"])
