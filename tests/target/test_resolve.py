from __future__ import annotations

import json
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


def test_the_embedded_name(target_folder: Path) -> None:
    found = resolve_target("embedded:smollm2-135m-instruct")
    assert found == Target(target_folder, EMBEDDED_ID, f"sha256:{PACKAGE.sha256}", "apache-2.0")


def test_an_unknown_embedded_name_gives_the_nearest() -> None:
    with pytest.raises(FastDraftError, match=r"did you mean 'embedded:smollm2-135m-instruct'\?"):
        resolve_target("embedded:smollm2-135m")


def test_a_local_folder(tiny_target_folder: Path) -> None:
    assert resolve_target(str(tiny_target_folder)) == Target(tiny_target_folder, "target")


@pytest.mark.parametrize("name", ["/nowhere/at/all", "./nowhere", "~/nowhere-of-mine", "a/b/c"])
def test_a_missing_folder(name: str) -> None:
    with pytest.raises(FastDraftError, match=r"folder .*(nowhere|a/b/c).* does not exist"):
        resolve_target(name)


@pytest.mark.parametrize("name", ["./nowhere", "my/model.gguf", "embedded:x"])
def test_a_dry_run_refuses_the_name_in_one_line(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = Path(__file__).parents[2] / "recipes/smollm2-135m/quickstart.yaml"
    assert main(["run", str(recipe), "--dry-run", f"target={name}"]) == 2
    assert "target: " in capsys.readouterr().err.splitlines()[-1]


def test_a_folder_that_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(FastDraftError, match=r"holds no config\.json"):
        resolve_target(str(tmp_path))


def test_pickled_weights_are_not_taken(tiny_target_folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(tiny_target_folder, copy)
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(FastDraftError, match=r"holds no \.safetensors weights; pickled"):
        resolve_target(str(copy))


def change(folder: Path, name: str, **values: object) -> None:
    file = folder / name
    known = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    file.write_text(json.dumps({**known, **values}), encoding="utf-8")


def test_a_model_with_code_of_its_own(tiny_target_folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(tiny_target_folder, copy)
    change(copy, "config.json", auto_map={"AutoConfig": "mine.Config"})
    assert resolve_target(str(copy)).path == copy  # transformers has a Llama of its own
    change(copy, "config.json", model_type="mine")
    with pytest.raises(FastDraftError, match=r"^design\.donor: .*trust_remote_code is not supp"):
        resolve_target(str(copy), key="design.donor")


def test_a_token_beyond_the_models_rows(tiny_target_folder: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_target_folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|extra|>"]})
    copy = tmp_path / "copy"
    shutil.copytree(tiny_target_folder, copy)
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


def test_a_hub_id_out_of_reach() -> None:
    with pytest.raises(FastDraftError, match="'nobody/nothing' is not on this machine"):
        resolve_target("nobody/nothing")


def test_a_name_the_hub_cannot_have() -> None:
    with pytest.raises(FastDraftError, match="neither a folder nor a model id"):
        resolve_target("no such name!")


def test_the_embedded_id_out_of_reach(
    target_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert resolve_target(EMBEDDED_ID).path == target_folder
    assert "using the packaged copy" in caplog.text


def test_a_revision_of_the_embedded_id_is_not_the_embedded_copy() -> None:
    with pytest.raises(FastDraftError, match="the Hub cannot be reached"):
        resolve_target(EMBEDDED_ID, revision="main")
