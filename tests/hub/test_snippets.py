"""The snippets of the README, the docs and the cards.

Every command line and every import is checked against this package; the Python of the pages that
users start from is run, with tiny models in place of those that it names. A block after
``<!-- untried: reason -->`` is for tools that are not on this machine and is only parsed.
"""

import ast
import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastdraft_hf import DraftDistillationConfig
from fastdraft_hf.cli.main import COMMANDS, _parse
from fastdraft_hf.draft.reduced_vocabulary import write_reduced_vocabulary
from fastdraft_hf.hub.folder import write_custom_generate
from fastdraft_hf.recipe import build_recipe, read_recipe
from fastdraft_hf.stages.runner import STAGES

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    *(p for folder in ("docs", "recipes", "benchmarks") for p in (ROOT / folder).rglob("*.md")),
    *(p for p in (ROOT / "model_cards").rglob("*.md") if p.name != "template.md"),
]
FENCE = re.compile(
    r"(?P<untried><!-- untried: [^\n]+ -->\n+)?^```(?P<kind>\w*)\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


def blocks(page: Path, *kinds: str, untried: bool = False) -> list[str]:
    found = FENCE.finditer(page.read_text(encoding="utf-8"))
    return [m["text"] for m in found if m["kind"] in kinds and (untried or not m["untried"])]


def pages_with(*kinds: str) -> Any:
    pages = sorted(page for page in PAGES if blocks(page, *kinds))
    return pytest.mark.parametrize("page", pages, ids=lambda page: str(page.relative_to(ROOT)))


# ----------------------------------------------------------------------------------------- shell


@pages_with("bash", "")
def test_shell(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for block in blocks(page, "bash", ""):
        for line in re.sub(r"\\\n\s*", " ", block).splitlines():
            words = shlex.split(line.partition(" > ")[0], comments=True)
            while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
                words = words[1:]
            if words:
                check_command(words)


def check_command(words: list[str]) -> None:
    """Check that a command, its options and the files and settings that it names exist."""
    program = Path(words[0]).name
    for word in words:
        if word.startswith(("recipes/", "benchmarks/")):
            assert (ROOT / word).is_file(), word
    if program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert {word for word in words[1:] if "=" not in word} <= set(targets), words
    elif program == "python":
        options = {word for word in words if word.startswith("--")}
        assert not {o for o in options if f'"{o}"' not in Path(words[1]).read_text()}, words
    elif program == "fastdraft":
        check_fastdraft(words[1:])
    elif program in ("torchrun", "accelerate"):  # the recipe and its settings follow the script
        check_fastdraft(["run", *words[words.index("recipes/run.py") + 1 :]])
    else:
        assert program in ("rm", "pip"), f"{shlex.join(words)}: mark it <!-- untried: reason -->"


SOURCES = {"sources": [{"kind": "generated", "name": "chat"}]}
RECIPE: dict[str, Any] = {
    "generate": {"sets": {"chat": {"kind": "magpie"}}},
    **dict.fromkeys(("pretrain", "continue", "align"), SOURCES),
}


def check_fastdraft(words: list[str]) -> None:
    try:
        args = _parse(words)
    except SystemExit as stop:  # an option or a command that does not exist
        if stop.code:
            raise AssertionError(words) from None
        return
    if args.command in ("run", "plan"):
        overrides = [word for word in args.overrides if not word.endswith("=")]
        recipe = str(args.recipe)
        # What follows is checked as a recipe's settings are: names, types, allowed values.
        if recipe.startswith("recipes/"):
            read_recipe(ROOT / recipe, overrides)
        else:
            build_recipe(RECIPE, overrides)
    if args.command == "run" and args.stages:
        assert set(args.stages.split(",")) <= STAGES.keys(), words


def test_every_command_is_on_a_page() -> None:
    text = "\n".join(block for page in PAGES for block in blocks(page, "bash", "", untried=True))
    assert [name for name in COMMANDS if f"fastdraft {name}" not in text] == []


# ---------------------------------------------------------------------------------------- Python


@pages_with("python")
def test_imports(page: Path) -> None:
    """Every block parses, and what it takes from this package is there."""
    package = importlib.import_module("fastdraft_hf")
    for block in blocks(page, "python", untried=True):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("fastdraft_hf"):
                module = importlib.import_module(str(node.module))
                assert not [a.name for a in node.names if not hasattr(module, a.name)], block
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "fastdraft_hf":
                assert hasattr(package, node.attr), block


@pytest.fixture
def names(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tiny_target_folder: Path,
    tiny_model: Any,
    tiny_tokenizer: Any,
) -> dict[str, Any]:
    """Stand in a folder with a tiny draft; return what a page's reader has at hand."""
    monkeypatch.chdir(tmp_path)
    for name in ("draft", "reduced"):
        tiny_model(seed=0, num_hidden_layers=1).save_pretrained(name)
        tiny_tokenizer.save_pretrained(name)
        write_custom_generate(Path(name))
    write_reduced_vocabulary(Path("reduced"), range(64))
    Path("target").symlink_to(tiny_target_folder)
    return {
        "__name__": "__main__",
        "datasets": datasets,
        "fastdraft_hf": importlib.import_module("fastdraft_hf"),
        "AutoModelForCausalLM": AutoModelForCausalLM,
        "tokenizer": AutoTokenizer.from_pretrained("target", padding_side="left"),
        "target": AutoModelForCausalLM.from_pretrained("target"),
        "draft": AutoModelForCausalLM.from_pretrained("draft"),
        "prompts": ["the cat", "the hat and the cat"],
        "inputs": tiny_tokenizer("the cat", return_tensors="pt"),
    }


MODELS = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": "target",
    "embedded:smollm2-135m-instruct": "target",
    "runs/smollm2-quickstart/draft": "draft",
    "YOUR/DRAFT": "draft",
    "runs/t/draft": "reduced",
}
RUN = [
    *("README.md", "docs/index.md", "docs/tutorial.md", "docs/api.md", "docs/trainer.md"),
    *("docs/decoding.md", "docs/evaluate.md", "docs/metrics.md", "docs/design.md"),
    *("docs/corpora.md", "docs/reduced-vocabulary.md", "docs/vocabulary.md", "docs/targets.md"),
]


@pytest.mark.parametrize("page", RUN)
def test_python(page: str, names: dict[str, Any], request: pytest.FixtureRequest) -> None:
    if page == "docs/metrics.md":
        pytest.importorskip("evaluate", reason="the metrics extra is not installed")
        request.getfixturevalue("evaluate_cache")
    if page == "docs/trainer.md":
        names["args"] = DraftDistillationConfig(
            output_dir="lora", max_steps=1, use_cpu=True, report_to="none"
        )
    own = dict(names)
    for number, block in enumerate(blocks(ROOT / page, "python")):
        if "OVModel" in block or "openvino" in block:  # run by test_published_draft.py
            continue
        text = re.sub(r'"([^"\n]+)"', lambda m: f'"{MODELS.get(m[1], m[1])}"', block)
        if page != "docs/trainer.md":  # its target is the embedded one
            text = text.replace('params="12M"', 'params="20k"')
        exec(compile(text, f"{page}[{number}]", "exec"), dict(names) if "peft" in text else names)
        if page == "docs/decoding.md":  # its sections do not build on each other
            names.update(own)


def test_an_objective_of_your_own(tmp_path: Path) -> None:
    """In a process of its own: a registered term stays registered."""
    for name, block in zip(
        ("skew.py", "check.py"), blocks(ROOT / "docs" / "objectives.md", "python"), strict=True
    ):
        (tmp_path / name).write_text(block, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "check.py"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    fused, dense, *differences = map(float, done.stdout.split())
    assert fused == pytest.approx(dense, rel=1e-5)
    assert max(differences) < 1e-5
