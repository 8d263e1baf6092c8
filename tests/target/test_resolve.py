import json
import re
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from fastdraft_hf._errors import FastDraftError
from fastdraft_hf.cli.main import main
from fastdraft_hf.target.embedded import EMBEDDED_ID, PACKAGE
from fastdraft_hf.target.resolve import Target, resolve_target, stop_ids


@pytest.fixture(autouse=True)
def _empty_hub_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # A machine's own cache may hold the very models that must be out of reach here.
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.fixture
def copy(tiny_target_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_target_folder, tmp_path / "copy"))


def test_names_that_are_found(
    target_folder: Path, tiny_target_folder: Path, copy: Path, caplog: pytest.LogCaptureFixture
) -> None:
    found = resolve_target("embedded:smollm2-135m-instruct")
    assert found == Target(target_folder, EMBEDDED_ID, f"sha256:{PACKAGE.sha256}", "apache-2.0")
    assert resolve_target(str(tiny_target_folder)) == Target(tiny_target_folder, "target")
    assert resolve_target(EMBEDDED_ID).path == target_folder
    # A folder's own word on its name and license is not taken.
    claim = {"model_id": "org/Other", "sha256": PACKAGE.sha256, "license": "mit"}
    change(copy, "fastdraft_source.json", **claim)
    assert resolve_target(str(copy)) == Target(copy, "copy")
    assert "using the packaged copy" in caplog.text


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("embedded:smollm2-135m", r"did you mean 'embedded:smollm2-135m-instruct'\?"),
        ("/nowhere/at/all", "folder /nowhere/at/all does not exist"),
        ("./nowhere", "folder nowhere does not exist"),
        ("~/nowhere-of-mine", "nowhere-of-mine does not exist"),
        ("a/b/c", "folder a/b/c does not exist"),
        ("my/model.gguf", "my/model.gguf is a file"),
    ],
)
def test_a_name_that_cannot_be_is_refused_in_a_dry_run_too(
    name: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(FastDraftError, match=f"^target: .*{message}"):
        resolve_target(name)
    recipe = Path(__file__).parents[2] / "recipes/smollm2-135m/quickstart.yaml"
    assert main(["run", str(recipe), "--dry-run", f"target={name}"]) == 2
    assert re.search(f"target: .*{message}", capsys.readouterr().err.splitlines()[-1])


@pytest.mark.parametrize(
    ("name", "revision", "message"),
    [
        ("nobody/nothing", None, "'nobody/nothing' is not on this machine"),
        ("no such name!", None, "neither a folder nor a model id"),
        (EMBEDDED_ID, "main", "the Hub cannot be reached"),  # not the embedded copy
    ],
)
def test_a_name_that_is_not_found(name: str, revision: str | None, message: str) -> None:
    with pytest.raises(FastDraftError, match=message):
        resolve_target(name, revision)


def test_a_folder_without_a_config_or_with_pickled_weights(copy: Path, tmp_path: Path) -> None:
    with pytest.raises(FastDraftError, match=r"holds no config\.json"):
        resolve_target(str(tmp_path))
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(FastDraftError, match=r"holds no \.safetensors weights; pickled"):
        resolve_target(str(copy))


def change(folder: Path, name: str, **values: object) -> None:
    file = folder / name
    known = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    file.write_text(json.dumps({**known, **values}), encoding="utf-8")


def test_a_model_with_code_of_its_own(copy: Path) -> None:
    change(copy, "config.json", auto_map={"AutoConfig": "mine.Config"})
    assert resolve_target(str(copy)).path == copy  # transformers has a Llama of its own
    change(copy, "config.json", model_type="mine")
    with pytest.raises(FastDraftError, match=r"^design\.donor: .*trust_remote_code is not supp"):
        resolve_target(str(copy), key="design.donor")


@pytest.mark.parametrize("part", ["config", "model", "tokenizer"])
@pytest.mark.parametrize(
    "words",
    [
        "run target={} output_dir=run device=cpu --stages design design.hidden_size=32",
        "run target=T output_dir=run device=cpu --stages design design.draft={}",
        "run target=T output_dir=run device=cpu --stages design design.donor={}",
        "tune {} params=1k",
        "demo --target {} --draft {} --engine transformers --max-new-tokens 2",
        "vocabulary {} {}",
    ],
)
def test_code_of_a_repository_never_runs(
    words: str,
    part: str,
    copy: Path,
    tiny_target_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Also not where a user answers yes to every prompt."""
    asked: list[str] = []
    monkeypatch.setattr("builtins.input", lambda prompt="": asked.append(prompt) or "y")
    monkeypatch.chdir(copy.parent)
    marker = copy.parent / "ran"
    (copy / "mine.py").write_text(f"open({str(marker)!r}, 'w')\nclass Mine: ...\n")
    if part == "tokenizer":
        (copy / "tokenizer.json").unlink()
        own = {"AutoTokenizer": ["mine.Mine", "mine.Mine"]}
        change(copy, "tokenizer_config.json", tokenizer_class="Mine", auto_map=own)
    else:
        kind = {"config": "mine", "model": "llama"}[part]
        own = {"AutoConfig": "mine.Mine", "AutoModelForCausalLM": "mine.Mine"}
        change(copy, "config.json", model_type=kind, auto_map=own)
    words = words.replace("{}", str(copy)).replace("=T ", f"={tiny_target_folder} ")
    status = main(words.split())
    said = capsys.readouterr().err.splitlines()
    assert not marker.exists()
    assert asked == []
    assert status == 0 or "fastdraft: " in said[-1]
    assert part == "model" or status == 2, said
    if part == "config":
        assert "needs the Python code of its repository (auto_map), which is never run" in said[-1]


def test_a_token_beyond_the_models_rows(copy: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(copy)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|extra|>"]})
    tokenizer.save_pretrained(copy)
    assert resolve_target(str(copy)).path == copy  # as Gemma's <image_soft_token>, never used
    tokenizer.chat_template = "<|extra|>" + tokenizer.chat_template
    tokenizer.save_pretrained(copy)
    with pytest.raises(FastDraftError, match=r"'<\|extra\|>' has id 288 and .* only 288 rows"):
        resolve_target(str(copy))


def test_every_end_counts(
    target_folder: Path,
    target_tokenizer: PreTrainedTokenizerBase,
    tiny_tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
) -> None:
    assert stop_ids(target_folder, target_tokenizer) == {0, 2}  # <|endoftext|>, <|im_end|>
    assert stop_ids(tmp_path, tiny_tokenizer) == {tiny_tokenizer.eos_token_id, 0}
    change(tmp_path, "config.json", text_config={"eos_token_id": 5})
    assert stop_ids(tmp_path, tiny_tokenizer) == {5, 0}
    change(tmp_path, "generation_config.json", eos_token_id=[7, 9])
    assert stop_ids(tmp_path, tiny_tokenizer) == {7, 9, 0}
