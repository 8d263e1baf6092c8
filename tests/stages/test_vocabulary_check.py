"""Every stage that pairs two models refuses other vocabularies, and through one function."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from fastdraft_hf import FastDraftError
from fastdraft_hf.cli import export as export_command
from fastdraft_hf.cli import main as cli
from fastdraft_hf.draft import vocabulary
from fastdraft_hf.recipe import build_recipe
from fastdraft_hf.stages import bench, design, evaluate, train
from fastdraft_hf.stages.runner import Run
from fastdraft_hf.target.resolve import Target
from fastdraft_hf.train.checks import open_teacher
from fastdraft_hf.train.config import DraftDistillationConfig
from fastdraft_hf.tune.reduced_vocabulary import reduce_draft

TRAIN = {"sources": [{"kind": "python"}]}


class Pair:
    """A target, a draft that does not fit it, and an empty folder to work in."""

    def __init__(self, target: Path, draft: Path, work: Path) -> None:
        self.target, self.draft, self.work = target, draft, work

    def run(self, **data: Any) -> Run:
        return Run(build_recipe({"device": "cpu", **data}), self.work, Target(self.target, "tiny"))

    def given(self) -> None:
        design.run(self.run(design={"draft": str(self.draft)}), self.work)

    def donor(self) -> None:
        section = {"donor": str(self.draft), "hidden_size": 16, "num_hidden_layers": 1}
        design.run(self.run(design=section), self.work)

    def pretrain(self) -> None:
        train.run(self.run(pretrain=TRAIN), self.work, "pretrain")

    def evaluate(self) -> None:
        evaluate.run(self.run(), self.work)

    def bench(self) -> None:
        bench.run(self.run(bench={"drafts": {"x": str(self.draft)}, "paths": ["ours"]}), self.work)

    def reduced_vocabulary(self) -> None:
        reduce_draft(self.draft, [], 50, self.work / "out", target=self.target)

    def export(self) -> None:
        words = ["export", "gguf", str(self.draft), "--target", str(self.target)]
        words += ["--output", str(self.work / "d.gguf")]
        args = cli.build_parser("export").parse_args(words)
        export_command.run(args)

    def online_target(self) -> None:
        args = DraftDistillationConfig(str(self.work), use_cpu=True, bf16=False)
        open_teacher(str(self.target), args, AutoTokenizer.from_pretrained(self.draft), 288)


STAGES = [
    "given",
    "donor",
    "pretrain",
    "evaluate",
    "bench",
    "reduced_vocabulary",
    "export",
]


@pytest.fixture
def pair(tiny_target_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pair:
    draft = tmp_path / "draft"
    (tmp_path / "work").mkdir()
    monkeypatch.setattr(Run, "latest_model", lambda self, before=None: draft)
    return Pair(tiny_target_folder, draft, tmp_path / "work")


@pytest.fixture
def save(pair: Pair, tiny_model: Callable[..., LlamaForCausalLM]) -> Callable[..., None]:
    def make(tokenizer: PreTrainedTokenizerFast, rows: int = 288) -> None:
        tiny_model(num_hidden_layers=1, vocab_size=rows).save_pretrained(pair.draft)
        tokenizer.save_pretrained(pair.draft)

    return make


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the one comparison was asked about."""
    compare, calls = vocabulary.compare_vocabularies, list[Any]()

    def counting(*given: Any) -> Any:
        calls.append(given)
        return compare(*given)

    monkeypatch.setattr(vocabulary, "compare_vocabularies", counting)
    return calls


@pytest.mark.parametrize("stage", [*STAGES, "online_target"])
def test_two_ids_that_mean_other_tokens(
    stage: str,
    pair: Pair,
    save: Callable[..., None],
    tiny_tokenizer: PreTrainedTokenizerFast,
    asked: list[Any],
) -> None:
    save(tiny_tokenizer)
    file = pair.draft / "tokenizer.json"
    data = json.loads(file.read_text(encoding="utf-8"))
    ids = data["model"]["vocab"]
    ids["a"], ids["b"] = ids["b"], ids["a"]
    file.write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises((FastDraftError, ValueError), match="its vocabulary is not the target's: 2"):
        getattr(pair, stage)()
    assert len(asked) == 1


@pytest.mark.parametrize("stage", STAGES)
def test_a_padded_head(
    stage: str,
    pair: Pair,
    save: Callable[..., None],
    tiny_tokenizer: PreTrainedTokenizerFast,
    asked: list[Any],
) -> None:
    save(tiny_tokenizer, rows=320)
    with pytest.raises(FastDraftError, match="the heads score 288 and 320 ids: padding"):
        getattr(pair, stage)()
    assert len(asked) == 1


@pytest.mark.parametrize("stage", [s for s in STAGES if s != "donor"] + ["online_target"])
def test_another_end(
    stage: str,
    pair: Pair,
    save: Callable[..., None],
    tiny_tokenizer: PreTrainedTokenizerFast,
    asked: list[Any],
) -> None:
    other = copy.deepcopy(tiny_tokenizer)
    other.eos_token = "<|endoftext|>"
    save(other)
    with pytest.raises((FastDraftError, ValueError), match=r"its EOS token is <\|endoftext\|>"):
        getattr(pair, stage)()
    assert len(asked) == 1


def test_another_end_is_nothing_to_a_donor(
    pair: Pair, save: Callable[..., None], tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    other = copy.deepcopy(tiny_tokenizer)
    other.eos_token = "<|endoftext|>"
    save(other)
    pair.donor()
    assert AutoTokenizer.from_pretrained(pair.work).eos_token == "<|im_end|>"
