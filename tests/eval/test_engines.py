"""Every setting of a runtime decodes through models that are loaded once."""

import dataclasses
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedTokenizerFast

from fastdraft_hf.draft.reduced_vocabulary import write_reduced_vocabulary
from fastdraft_hf.eval import bench
from fastdraft_hf.eval.bench import Models, Setting, load_engine
from fastdraft_hf.eval.prompts import EvaluationPrompt

PROMPT = EvaluationPrompt("humaneval", "H/0", (40, 41, 42, 43) * 4)


@pytest.fixture(scope="module")
def models(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_target_folder: Path,
    tiny_model: Callable[..., LlamaForCausalLM],
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> Models:
    root = tmp_path_factory.mktemp("drafts")
    tiny_model(seed=1, num_hidden_layers=1).save_pretrained(root / "draft")
    tiny_tokenizer.save_pretrained(root / "draft")
    return Models(target=str(tiny_target_folder), draft=str(root / "draft"), stop_ids=[2])


@pytest.mark.parametrize("reduced", [False, True])
def test_pytorch_loads_each_model_once(
    models: Models, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, reduced: bool
) -> None:
    if reduced:  # the target itself, and stock decoding reads its full head
        folder = Path(shutil.copytree(models.target, tmp_path / "reduced"))
        write_reduced_vocabulary(folder, range(64))
        models = dataclasses.replace(models, draft=str(folder))
    loaded: Counter[str] = Counter()
    load = AutoModelForCausalLM.from_pretrained

    def counting(folder: str, **given: Any) -> Any:
        assert (given["use_safetensors"], given["trust_remote_code"]) == (True, False)
        loaded[folder] += 1
        return load(folder, **given)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", counting)
    monkeypatch.setattr(bench, "LOOKUP", 0)  # stock copies nothing
    paths = bench.RUNTIMES["pytorch"]
    settings = bench.all_settings(bench.assisted_settings(paths, [1, 3]))
    decode = load_engine(models, settings)
    assert loaded == {models.target: 1, models.draft: 1 + reduced}
    alone = decode(Setting("alone"), PROMPT, 12)
    assert (alone.path, alone.num_assistant_tokens, alone.drafted) == ("transformers", 0, 0)
    rounds = {}
    for setting in settings:
        record = decode(setting, PROMPT, 12)
        assert record.tokens == alone.tokens, setting
        assert record.num_assistant_tokens == setting.num_assistant_tokens
        assert (record.task, record.key) == ("humaneval", "H/0")
        assert bool(record.drafted) == (setting.num_assistant_tokens > 0)
        rounds[setting] = record.rounds
    assert (rounds[Setting("ours", 3)] == rounds[Setting("transformers", 3)]) is not reduced
    assert len(decode(Setting("alone"), PROMPT, 3).tokens) == 3
    monkeypatch.setattr(bench, "LOOKUP", 1)
    copying = decode(Setting("ours", 3), PROMPT, 12)
    assert copying.tokens == alone.tokens
    assert copying.rounds != rounds[Setting("ours", 3)]


def test_openvino_decodes_in_every_way(models: Models, openvino_models: Any) -> None:
    found = Models(
        target=models.target,
        target_openvino=str(openvino_models.target),
        draft_openvino=str(openvino_models.draft),
        stop_ids=[2],
    )
    paths = bench.RUNTIMES["openvino"]
    settings = bench.all_settings(bench.assisted_settings(paths, [1, 3]))
    decode = load_engine(found, settings)
    # A draft must not make the target alone compile again: the time would count as its own.
    decode(Setting("ours-openvino-alone"), PROMPT, 4)
    compiled = decode.target.request  # type: ignore[attr-defined]
    assert compiled is not None
    accepted = {}
    for setting in settings:
        record = decode(setting, PROMPT, 12)
        assert len(record.tokens) == 12 or record.tokens[-1] == 2
        assert record.num_assistant_tokens == setting.num_assistant_tokens
        assert record.path == setting.path.removesuffix("-alone")
        assert record.first_token_seconds is not None
        accepted[setting] = record.accepted
        assert record.target_passes == len(record.tokens) - record.accepted
    decode(Setting("ours-openvino-alone"), PROMPT, 4)
    assert decode.target.request is compiled  # type: ignore[attr-defined]
    # The tokens of this text are not in a reduced head: it is the given draft that is used.
    reduced = dataclasses.replace(found, draft_openvino=str(openvino_models.reduced))
    drafting = bench.assisted_settings(["openvino", "ours-openvino"], [3])
    decode = load_engine(reduced, bench.all_settings(drafting))
    for setting in drafting:
        assert decode(setting, PROMPT, 12).accepted < accepted[setting]
