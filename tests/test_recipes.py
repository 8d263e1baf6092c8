"""Recipes for machines nobody has here: what can be checked without weights and network."""

import functools
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from transformers import AutoConfig, PretrainedConfig

from fastdraft_hf.data.sources import Source
from fastdraft_hf.data.task_sets import HUB_SETS, settings_of
from fastdraft_hf.draft.design import design_draft
from fastdraft_hf.draft.families import count_parameters
from fastdraft_hf.plan.estimate import Plan
from fastdraft_hf.plan.machines import DEVICES
from fastdraft_hf.recipe import Recipe, build_recipe, read_recipe
from fastdraft_hf.stages.runner import planned

ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "recipes"
FIXTURES = ROOT / "tests" / "fixtures"
COLUMNS = json.loads((FIXTURES / "columns.json").read_text(encoding="utf-8"))

# Hub id -> its config here and its published number of parameters.
TARGETS = {
    "microsoft/Phi-3-mini-4k-instruct": ("phi-3-mini-4k-instruct", 3_821_079_552),
    "microsoft/Phi-4-mini-instruct": ("phi-4-mini-instruct", 3_836_021_760),
    "meta-llama/Llama-3.1-8B-Instruct": ("llama-3.1-8b-instruct", 8_030_261_248),
    "Qwen/Qwen3-8B": ("qwen3-8b", 8_190_735_360),
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": ("smollm2-1.7b-instruct", 1_711_376_384),
    "HuggingFaceTB/SmolLM2-135M-Instruct": ("smollm2-135m-instruct", 134_515_008),
    "embedded:smollm2-135m-instruct": ("smollm2-135m-instruct", 134_515_008),
}
FILES = sorted(
    path
    for path in (*RECIPES.glob("*.yaml"), *RECIPES.glob("*/*.yaml"))
    if path.parent.name not in ("accelerate", "presets")
)
PAPER = ("phi-3-mini/50m.yaml", "phi-3-mini/120m.yaml", "llama-3.1-8b/150m.yaml")


def name_of(path: Path) -> str:
    return str(path.relative_to(RECIPES))


def config_of(recipe: Recipe) -> Path:
    return FIXTURES / "targets" / f"{TARGETS[recipe.target][0]}.json"


@pytest.fixture(params=FILES, ids=name_of)
def path(request: pytest.FixtureRequest) -> Path:
    found: Path = request.param
    return found


@pytest.fixture(params=["cpu", "cuda"])
def recipe(path: Path, request: pytest.FixtureRequest) -> Recipe:
    """The recipe as it is on both kinds of machines; reading it checks its schema."""
    return read_recipe(path, [f"device={request.param}"])


def test_a_resolved_recipe_is_the_recipe(path: Path, recipe: Recipe) -> None:
    # pretrained makes what another recipe aligns.
    assert (recipe.align is None) == (path.stem == "pretrained")
    assert build_recipe(yaml.safe_load(yaml.safe_dump(recipe.resolved()))) == recipe


def test_a_given_draft_is_what_another_recipe_makes() -> None:
    recipes = {path: read_recipe(path, ["device=cpu"]) for path in FILES}
    made = {
        f"{one.output_dir}/{stage}": path for path, one in recipes.items() for stage in planned(one)
    }
    found = {
        path.stem: made[str(one.design.draft)].stem
        for path, one in recipes.items()
        if one.design.draft is not None and not one.design.draft.startswith("model_cards/")
    }
    assert found == {"sharpen": "full"}
    given = {str(one.design.draft) for one in recipes.values() if one.design.draft} - set(made)
    assert all((ROOT / draft / "config.json").is_file() for draft in given)


@pytest.mark.parametrize(
    ("words", "does"),
    [
        (["quickstart"], "run recipes/smollm2-135m/quickstart.yaml"),
        (["quickstart", "RECIPE=some.yaml"], "run some.yaml"),
    ],
)
def test_make_runs_the_recipes(words: list[str], does: str) -> None:
    done = subprocess.run(
        ["make", "--no-print-directory", "-n", *words, "VENV=env"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines()[-1].strip() == f"env/bin/fastdraft {does}"


def test_there_is_a_recipe_for_every_target_that_was_promised() -> None:
    made = {read_recipe(path, ["device=cpu"]).target for path in FILES}
    assert made == set(TARGETS)
    assert {name_of(path) for path in FILES} >= set(PAPER)


@functools.cache
def published(path: Path) -> tuple[PretrainedConfig, int]:
    config = AutoConfig.from_pretrained(path)
    return config, count_parameters(config)


def test_a_draft_fits_its_budget_and_the_target_is_what_is_published(recipe: Recipe) -> None:
    config, parameters = published(config_of(recipe))
    assert parameters == TARGETS[recipe.target][1]
    draft = design_draft(config, recipe.design)
    size = count_parameters(draft)
    # Most of the budget is used: the next wider draft would not fit.
    if recipe.design.params is not None:
        assert 0.75 * recipe.design.params < size <= 1.02 * recipe.design.params
    assert draft.vocab_size == config.vocab_size
    assert draft.num_hidden_layers == (recipe.design.num_hidden_layers or 2)


def test_columns_of_the_hub_are_there(recipe: Recipe) -> None:
    sources: list[Source] = [s for t in recipe.training_stages().values() for s in t.sources]
    for source in sources:
        if source.kind == "hub":
            facts = COLUMNS[source.name]
            assert source.column in facts["columns"]
            assert (source.subset or "default") in facts["subsets"]
    for wanted in (recipe.generate.sets if recipe.generate else {}).values():
        if wanted.kind == "dataset":
            used = {str(wanted.column), *wanted.context_columns}
            assert used <= set(COLUMNS[str(wanted.dataset)]["columns"])
    for name, settings in settings_of(recipe.evaluate.tasks):
        task = settings or HUB_SETS.get(name)
        if task is not None and task.dataset and task.kind is None:
            facts = COLUMNS[task.dataset]
            assert task.column in facts["columns"]
            assert (task.name or "default") in facts["subsets"]


def test_what_is_measured_on_is_no_training_data(recipe: Recipe) -> None:
    held_out = {task.dataset for task in HUB_SETS.values()}
    for stage in recipe.training_stages().values():
        assert not held_out & {source.name for source in stage.sources}
    for wanted in (recipe.generate.sets if recipe.generate else {}).values():
        assert getattr(wanted, "dataset", None) not in held_out


def test_budgets_are_whole_steps_and_fit_the_data(recipe: Recipe) -> None:
    for name, stage in recipe.training_stages().items():
        assert stage.max_train_tokens >= 50 * stage.step_tokens, name
        total = sum(source.weight for source in stage.sources)
        for source in stage.sources:
            known = COLUMNS.get(source.name, {}).get("tokens", {}).get(source.subset)
            if known:
                assert stage.max_train_tokens * source.weight / total <= known


def test_it_fits_into_one_80_gb_device(path: Path, tmp_path: Path) -> None:
    recipe = read_recipe(path, ["device=cuda"])
    shutil.copy(config_of(recipe), tmp_path / "config.json")
    recipe.target = str(tmp_path)
    if recipe.design.draft is not None:  # of another recipe's run; the shipped one came of it
        recipe.design.draft = str(ROOT / "model_cards" / "SmolLM2-135M-Instruct-FastDraft")
    plan = Plan(recipe, DEVICES["H100"])
    for stage in plan.stages:
        assert stage.memory_bytes < DEVICES["H100"].memory, stage.stage
    assert 0 < sum(stage.seconds for stage in plan.stages) < 14 * 24 * 3600


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_recipes_are_the_papers(name: str) -> None:
    recipe = read_recipe(RECIPES / name, ["device=cuda"])
    pretrain, continued, align = recipe.training_stages().values()
    assert pretrain.max_train_tokens == 5e9
    weights = [source.weight for source in continued.sources]
    shares = [continued.max_train_tokens * weight / sum(weights) for weight in weights]
    assert shares == [5e9, 2.5e9]
    assert (pretrain.objective, continued.objective, align.objective) == ("ce", "ce", "ce")
    assert recipe.design.init == "scratch"
    assert recipe.generate is not None
    for wanted in recipe.generate.sets.values():
        assert wanted.temperatures == [0.0, 0.6, 0.8, 1.0]
    assert "magpie" in {wanted.kind for wanted in recipe.generate.sets.values()}
    assert recipe.evaluate.gammas == [3]
    assert recipe.evaluate.temperatures == [0.6]
    assert set(recipe.evaluate.tasks) == {"cnn_dailymail", "tinystories", "dolly", "humaneval"}


# fmt: off
ON_CPUS = ("any", "realign", "quickstart", "from-nothing", "full", "sharpen", "objectives",
           "pretrained")
# fmt: on
ON_GPUS = [path for path in FILES if path.stem not in ON_CPUS]


@pytest.mark.parametrize("path", ON_GPUS, ids=name_of)
def test_a_readme_says_what_the_recipe_is(path: Path) -> None:
    """Size, layers and tokens in the table; and tokens in that of all recipes."""
    recipe = read_recipe(path, ["device=cuda"])
    text = (path.parent / "README.md").read_text(encoding="utf-8")
    (row,) = re.findall(rf"^\| `{path.name}` \| (.*) \| (.*) \|$", text, re.MULTILINE)
    budgets = [stage.max_train_tokens for stage in recipe.training_stages().values()]
    size = f"{recipe.design.params / 1e6:g}M, {recipe.design.num_hidden_layers} layers"
    assert row[0].startswith(size)
    assert row[1] == ", ".join(
        f"{n / 1e9:.3g}B" if n >= 1e9 else f"{n / 1e6:.3g}M" for n in budgets
    )
    whole = (RECIPES / "README.md").read_text(encoding="utf-8")
    named = (path.parent.name, path.name)
    (line,) = [line for line in whole.splitlines() if all(name in line for name in named)]
    (shown,) = re.findall(r"\| ([\d.]+)B \|$", line)
    assert float(shown) == pytest.approx(sum(budgets) / 1e9, abs=0.0501)


@pytest.mark.parametrize("folder", sorted(p.parent for p in RECIPES.glob("*/README.md")), ids=str)
def test_the_commands_of_a_readme_name_its_recipes(folder: Path) -> None:
    """One recipe is planned, run on one device and launched on several."""
    text = (folder / "README.md").read_text(encoding="utf-8")
    (launched,) = re.findall(r"^accelerate launch .* recipes/run\.py (\S+)$", text, re.MULTILINE)
    assert re.findall(r"^fastdraft plan (\S+)", text, re.MULTILINE) == [launched]
    assert launched in re.findall(r"^fastdraft run (\S+)", text, re.MULTILINE)
    for name in re.findall(r"recipes/[\w./-]+\.(?:yaml|py)", text):
        assert (ROOT / name).is_file(), name


@pytest.mark.parametrize("path", sorted((RECIPES / "accelerate").glob("*.yaml")), ids=name_of)
def test_accelerate_reads_its_configurations(path: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    found = load_config_from_file(str(path))
    assert found.num_processes >= 1
