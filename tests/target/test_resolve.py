from __future__ import annotations

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
    target_folder: Path, tiny_target_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    found = resolve_target("embedded:smollm2-135m-instruct")
    assert found == Target(target_folder, EMBEDDED_ID, f"sha256:{PACKAGE.sha256}", "apache-2.0")
    assert resolve_target(str(tiny_target_folder)) == Target(tiny_target_folder, "target")
    assert resolve_target(EMBEDDED_ID).path == target_folder
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
