"""Every snippet of the README, the docs and the cards: it runs, or says that it was not tried.

A fenced block of Python or of shell lines may carry ``<!-- untried: reason -->`` on the line before
it. All others are run here, in the order of their page, with tiny models in place of the named
ones; shell lines that start ``fastdraft`` go through the real command with ``--dry-run``.
"""

from __future__ import annotations

import importlib
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pytest
import yaml
from hub_server import HubServer
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastdraft_hf._card import fill_card
from fastdraft_hf._extras import openvino_available
from fastdraft_hf.draft.reduced_vocabulary import ReducedVocabulary, write_reduced_vocabulary
from fastdraft_hf.eval.summary import RunSummary
from fastdraft_hf.hub.card import render_card
from fastdraft_hf.hub.folder import write_custom_generate

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "recipes").rglob("*.md")),
    *sorted((ROOT / "benchmarks").rglob("*.md")),
]
# Of drafts that were really trained; the template is rendered below.
CARDS = sorted(p for p in (ROOT / "model_cards").rglob("*.md") if p.name != "template.md")
SHELL, PYTHON = {"bash", "sh", "console", ""}, {"python", "py"}
_FENCE = re.compile(
    r"(?:^<!-- untried: (?P<untried>[^\n]+) -->\n+)?^```(?P<kind>\w*)\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


@dataclass
class Snippet:
    kind: str
    text: str
    untried: str | None

    @property
    def openvino(self) -> bool:
        return "openvino" in self.text or "OVModel" in self.text


def snippets(text: str) -> list[Snippet]:
    found = _FENCE.finditer(text)
    return [Snippet(m["kind"], m["text"], m["untried"]) for m in found]


def of_page(path: Path, kinds: set[str]) -> list[Snippet]:
    return [s for s in snippets(path.read_text(encoding="utf-8")) if s.kind in kinds]


def pages_with(kinds: set[str]) -> list[Path]:
    return [page for page in PAGES if any(not s.untried for s in of_page(page, kinds))]


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT).with_suffix(""))


def test_no_kind_of_block_is_overlooked() -> None:
    kinds = {s.kind for page in PAGES for s in snippets(page.read_text(encoding="utf-8"))}
    assert kinds <= SHELL | PYTHON | {"yaml", "text", "json"}
    fences = [line for page in PAGES for line in page.read_text().splitlines() if "```" in line]
    found = [s for page in PAGES for s in snippets(page.read_text(encoding="utf-8"))]
    assert len(fences) == 2 * len(found)


# ---------------------------------------------------------------------------------------- Python


@pytest.fixture
def places(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tiny_target_folder: Path,
    tiny_model: Any,
    tiny_tokenizer: Any,
) -> Callable[[str], str]:
    """Stand in an empty folder; give what puts tiny models in place of those a text names."""
    draft = tmp_path / "the-draft"
    tiny_model(seed=0, num_hidden_layers=1).save_pretrained(draft)
    tiny_tokenizer.save_pretrained(draft)
    write_custom_generate(draft)
    reduced = tmp_path / "reduced"
    shutil.copytree(draft, reduced)
    write_reduced_vocabulary(reduced, ReducedVocabulary(tuple(range(64))))
    (tmp_path / "target").symlink_to(tiny_target_folder)
    (tmp_path / "draft").symlink_to(draft)
    monkeypatch.chdir(tmp_path)

    def replace(text: str) -> str:
        for name in ("HuggingFaceTB/SmolLM2-135M-Instruct", "embedded:smollm2-135m-instruct"):
            text = text.replace(f'"{name}"', f'"{tiny_target_folder}"')
        for name in ("runs/smollm2-quickstart/draft", "runs/draft/align", "YOUR/DRAFT"):
            text = text.replace(f'"{name}"', f'"{draft}"')
        text = text.replace('"runs/t/reduced"', f'"{reduced}"')
        return text.replace("params=12_000_000", "params=28_000")

    return replace


def prelude(target: Path, draft: Path) -> dict[str, Any]:
    """What a page's readers have at hand."""
    tokenizer = AutoTokenizer.from_pretrained(target)
    models = [AutoModelForCausalLM.from_pretrained(folder) for folder in (target, draft)]
    return {
        "__name__": "__main__",
        "datasets": datasets,
        "fastdraft_hf": importlib.import_module("fastdraft_hf"),
        "AutoModelForCausalLM": AutoModelForCausalLM,
        "tokenizer": tokenizer,
        "target": models[0],
        "draft": models[1],
        "prompts": ["the cat", "the hat and the cat"],
        "inputs": tokenizer("the cat", return_tensors="pt"),
    }


OWN_TESTS = {"objectives.md", "hub.md"}


@pytest.mark.parametrize(
    "page", [p for p in pages_with(PYTHON) if p.name not in OWN_TESTS], ids=name_of
)
def test_python(
    page: Path,
    places: Callable[[str], str],
    tmp_path: Path,
    tiny_target_folder: Path,
    request: pytest.FixtureRequest,
) -> None:
    names = prelude(tiny_target_folder, tmp_path / "the-draft")
    if page.name == "trainer.md":
        names |= trainer_prelude(tmp_path)
    if page.name == "generate.md":
        generated = tmp_path / "runs" / "mine" / "generate" / "chat"
        generated.mkdir(parents=True)
        rows = datasets.Dataset.from_list([{"prompt_ids": [1, 2], "completion_ids": [3]}])
        rows.to_parquet(generated / "part-00000.parquet")
    if page.name == "metrics.md":
        pytest.importorskip("evaluate", reason="the metrics extra is not installed")
        request.getfixturevalue("evaluate_cache")
        names["tokenizer"].padding_side = "left"
    blocks = [s for s in of_page(page, PYTHON) if not s.untried and not s.openvino]
    first = {}
    for number, block in enumerate(blocks):
        # Sections that go back to what the page began with, after others took its names.
        if "record_rounds" in block.text:
            names |= prelude(tiny_target_folder, tmp_path / "the-draft")
        if "last_complete_checkpoint" in block.text:
            names |= first
        exec(compile(places(block.text), f"{page.name}[{number}]", "exec"), names)
        first = first or {name: names[name] for name in ("trainer",) if name in names}


def trainer_prelude(folder: Path) -> dict[str, Any]:
    from fastdraft_hf import DraftDistillationConfig

    args = DraftDistillationConfig(
        output_dir=str(folder / "lora"), max_steps=1, use_cpu=True, report_to="none"
    )
    return {"args": args}


def test_the_loss_of_your_own(tmp_path: Path) -> None:
    """In a process of its own: a registered term is there for all tests."""
    first, second = of_page(ROOT / "docs" / "objectives.md", PYTHON)
    (tmp_path / "skew.py").write_text(first.text, encoding="utf-8")
    (tmp_path / "check.py").write_text(second.text, encoding="utf-8")
    words = [sys.executable, "check.py"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    one, plain, *gradients = map(float, done.stdout.split())
    assert one == pytest.approx(plain, rel=1e-5)
    assert max(gradients) < 1e-5


def test_the_hubs_page(
    hub: HubServer, tmp_path: Path, tiny_model: Any, tiny_tokenizer: Any
) -> None:
    from fastdraft_hf import DraftDistillationConfig, DraftDistillationTrainer

    rows = [{"input_ids": [5, 6, 7, 8], "labels": [5, 6, 7, 8]}] * 2
    trainer = DraftDistillationTrainer(
        model=tiny_model(),
        args=DraftDistillationConfig(
            output_dir=str(tmp_path / "out"),
            max_steps=1,
            use_cpu=True,
            report_to="none",
            dataset_kwargs={"skip_prepare_dataset": True},
            hub_model_id="user/mine",
        ),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tiny_tokenizer,
    )
    (block,) = of_page(ROOT / "docs" / "hub.md", PYTHON)
    exec(block.text, {"trainer": trainer})
    assert hub.models["user/mine"].history()[0].title == "Aligned"


@pytest.mark.slow
@pytest.mark.skipif(not openvino_available(), reason="the openvino extra is not installed")
@pytest.mark.parametrize("page", ["decoding.md", "metrics.md"])
@pytest.mark.usefixtures("evaluate_cache")
def test_python_of_openvino(
    page: str, places: Callable[[str], str], tmp_path: Path, tiny_target_folder: Path
) -> None:
    from fastdraft_hf.export.openvino import export_openvino

    export_openvino(tiny_target_folder, tmp_path / "target-int8", "int8")
    export_openvino(tmp_path / "the-draft", tmp_path / "draft-int8", "int8")
    names = prelude(tiny_target_folder, tmp_path / "the-draft")
    for number, block in enumerate(of_page(ROOT / "docs" / page, PYTHON)):
        # `record_rounds` of a PyTorch target; the page's OpenVINO block has put another there.
        if "record_rounds" in block.text:
            names |= prelude(tiny_target_folder, tmp_path / "the-draft")
        exec(compile(places(block.text), f"{page}[{number}]", "exec"), names)


def test_every_page_with_openvino_is_run() -> None:
    """The list of the test above is whole; a card's are run by `test_published_draft.py`."""
    found = {p.name for p in PAGES for s in of_page(p, PYTHON) if s.openvino and not s.untried}
    assert found == {"decoding.md", "metrics.md"}


# ----------------------------------------------------------------------------------------- shell

# Commands of others, and the test that runs them.
TRIED_ELSEWHERE = {
    "optimum-cli export openvino": "tests/export/test_openvino_export.py",
    "accelerate launch": "tests/cli/test_plan_command.py",
    "torchrun": "tests/train/test_distributed.py",
}

# Commands of ours without a dry run. What they do is tested beside them; here: that they are read.
PARSED = ("pull", "plan", "tune", "reduced_vocabulary", "vocabulary", "demo")


def command_lines(text: str) -> list[list[str]]:
    """Return the words of each command; what was set before is put in for ``$NAME``."""
    joined = re.sub(r"\\\n\s*", " ", text)
    variables: dict[str, str] = {}
    found = []
    for line in joined.splitlines():
        for name, value in variables.items():
            line = re.sub(rf"\${name}\b", value, line)
        given = re.fullmatch(r'([A-Z_]+)=(?:"([^"]*)"|(\S+))', line.strip())
        if given is not None:
            variables[given[1]] = given[2] or given[3] or ""
        elif words := shlex.split(line, comments=True):
            assert not [w for w in words if w.startswith("$")], line
            found.append(words)
    return found


@pytest.mark.parametrize("page", pages_with(SHELL), ids=name_of)
def test_shell(
    page: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fastdraft: Callable[..., tuple[int, str]],
    run_folder: Path,
) -> None:
    recipe = {
        "target": "embedded:smollm2-135m-instruct",
        "output_dir": str(tmp_path / "new"),
        "generate": {"sets": {"chat": {"kind": "magpie", "rows": 10}}},
        "logits": {},
    }
    trained = {"max_train_tokens": "1M"}
    for stage, kind in (("pretrain", "python"), ("continue", "python"), ("align", "generated")):
        source = {"kind": kind, **({"name": "chat"} if kind == "generated" else {})}
        recipe[stage] = {"sources": [source] * 2, **trained}
    for name in ("RECIPE.yaml", "my.yaml", "my-recipe.yaml"):
        (tmp_path / name).write_text(yaml.safe_dump(recipe), encoding="utf-8")
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    (tmp_path / "benchmarks").symlink_to(ROOT / "benchmarks")
    (tmp_path / "mine.jsonl").write_text('{"prompt": "Hello"}\n', encoding="utf-8")
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "a.txt").write_text("Some text.\n", encoding="utf-8")
    (tmp_path / "runs").mkdir()
    run_folder.rename(tmp_path / "runs" / "mine")
    exported = tmp_path / "runs" / "mine" / "export" / "openvino-int8"
    exported.mkdir(parents=True, exist_ok=True)
    (exported / "openvino_model.xml").write_text("<xml/>", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    for snippet in of_page(page, SHELL):
        if not snippet.untried:
            for words in command_lines(snippet.text):
                run_line(words, fastdraft)


def run_line(words: list[str], fastdraft: Callable[..., tuple[int, str]]) -> None:
    while re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words = words[1:]
    line = shlex.join(words)
    program = Path(words[0]).name
    if program == "fastdraft":
        run_fastdraft(words[1:], fastdraft)
    elif program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
        assert {w for w in words[1:] if "=" not in w} <= set(targets), line
    elif program in ("python", "python3") and words[1].startswith(("benchmarks/", "recipes/")):
        source = (ROOT / words[1]).read_text(encoding="utf-8")
        for option in (w for w in words[2:] if w.startswith("--")):
            assert f'"{option}"' in source, line
    else:
        known = [test for start, test in TRIED_ELSEWHERE.items() if line.startswith(start)]
        assert known, f"{line}: run it in a test, or mark it <!-- untried: reason -->"
        assert (ROOT / known[0]).is_file()
        for word in words:
            if word.startswith("recipes/"):
                assert (ROOT / word).is_file(), line


SMALL = ("design.params=12M", "design.num_hidden_layers=2")


def run_fastdraft(words: list[str], fastdraft: Callable[..., tuple[int, str]]) -> None:
    if ">" in words:  # to a file
        words = words[: words.index(">")]
    line = shlex.join(["fastdraft", *words])
    if any(word.startswith("recipes/") for word in words) and words[0] in ("design", "run"):
        # Recipes of targets that are not on this machine; `tests/test_recipes.py` checks them.
        words = [*words, "target=embedded:smollm2-135m-instruct", *SMALL]
    if words[0] in ("schema", "card") or "--help" in words or words[0] == "--help":
        if words[0] != "card" or "--config" in words:
            words = [*words, "--dry-run"] if words[0] == "card" else words
        check(fastdraft, words, line)
    elif words[0] in PARSED:
        from fastdraft_hf.cli.main import build_parser

        build_parser(words[0]).parse_args(words)
    elif words[:2] == ["export", "openvino"] and not openvino_available():
        with pytest.raises(AssertionError, match="OpenVINO is not installed"):
            check(fastdraft, [*words, "--dry-run"], line)
    else:
        check(fastdraft, [w for w in words if w != "--dry-run"] + ["--dry-run"], line)


def check(fastdraft: Callable[..., tuple[int, str]], words: list[str], line: str) -> None:
    try:
        status, said = fastdraft(*(fill(word) for word in words))
    except SystemExit as stop:  # argparse: --help, or a word it does not know
        status, said = int(stop.code or 0), ""
    assert status == 0, f"{line}: {said}"


def fill(word: str) -> str:
    """Put something that is there in place of a placeholder."""
    target = "embedded:smollm2-135m-instruct"
    placeholders = {
        "R.yaml": "RECIPE.yaml",
        "T": target,
        "TARGET": target,
        "Qwen/Qwen3-8B": target,
        "Qwen/Qwen3-0.6B": target,
        "DRAFT": "runs/mine/draft",
        "some/draft": "runs/mine/draft",
    }
    return placeholders.get(word, word)


# ----------------------------------------------------------------------------------------- cards


FACTS = {"model_name": "d", "target": "org/T", "num_assistant_tokens": 3}


def test_the_snippets_of_cards(run_summary: RunSummary) -> None:
    """Python is run by `test_published_draft.py` and the README's; what is not says so."""
    card = render_card(run_summary, FACTS, draft_location="user/d", openvino="openvino-int8")
    bare = fill_card(
        model_name="d", target_name="org/T", draft_location="user/d", num_assistant_tokens=3
    )
    for text, python in ((card.text, 4), (bare.text, 2)):
        found = snippets(text)
        assert len([s for s in found if s.kind in PYTHON and not s.untried]) == python
        shell = [s for s in found if s.kind in SHELL]
        marked = {s.text.split()[0] for s in shell if s.untried}
        assert marked == {"vllm", "python", "llama-server"}
        for snippet in shell:
            if not snippet.untried:
                for words in command_lines(snippet.text):
                    run_line(words, lambda *words: (0, ""))
    (vllm,) = [s for s in snippets(card.text) if s.text.startswith("vllm")]
    (words,) = command_lines(vllm.text)
    assert json.loads(words[-1]) == {
        "method": "draft_model",
        "model": "user/d",
        "num_speculative_tokens": 3,
    }


def shape_of(snippet: Snippet) -> str:
    """Return a snippet's code without its names and numbers."""
    return re.sub(r"\d+", "0", re.sub(r'"[^"\n]*"', '""', snippet.text))


@pytest.mark.parametrize("page", CARDS, ids=name_of)
def test_the_snippets_of_a_real_drafts_card(page: Path, run_summary: RunSummary) -> None:
    """They are the template's, which are run."""
    known = {
        shape_of(snippet)
        for openvino in (None, "openvino-int8", "/x/openvino-int8")
        for snippet in snippets(
            render_card(run_summary, FACTS, draft_location="user/d", openvino=openvino).text
        )
    }
    found = snippets(page.read_text(encoding="utf-8"))
    assert found
    for snippet in found:
        assert snippet.untried or snippet.kind == "bibtex" or shape_of(snippet) in known
