"""Every stage that pairs two models refuses other vocabularies, and through one function."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from fastdraft_hf import FastDraftError
from fastdraft_hf.cli import export as export_command
from fastdraft_hf.cli import main as cli
from fastdraft_hf.draft import vocabulary
from fastdraft_hf.recipe import build_recipe
from fastdraft_hf.stages import design, evaluate, train
from fastdraft_hf.stages.reduced_vocabulary import reduce_draft
from fastdraft_hf.stages.runner import Run
from fastdraft_hf.target.resolve import Target
from fastdraft_hf.train.checks import open_teacher
from fastdraft_hf.train.config import DraftDistillationConfig

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


STAGES = ["given", "donor", "pretrain", "evaluate", "reduced_vocabulary", "export"]


@pytest.fixture
def pair(tiny_target_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pair:
    (tmp_path / "work").mkdir()
    monkeypatch.setattr(Run, "latest_model", lambda self, before=None: tmp_path / "draft")
    return Pair(tiny_target_folder, tmp_path / "draft", tmp_path / "work")


@pytest.fixture
def refuses(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Check that a stage refuses the pair, and that it asked the one comparison once."""
    compare, calls = vocabulary.compare_vocabularies, list[Any]()

    def counting(*given: Any) -> Any:
        calls.append(given)
        return compare(*given)

    def check(stage: str, message: str) -> None:
        monkeypatch.setattr(vocabulary, "compare_vocabularies", counting)
        with pytest.raises(FastDraftError, match=message):
            getattr(pair, stage)()
        assert len(calls) == 1

    return check


@pytest.fixture
def other_end(tiny_tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    other = copy.deepcopy(tiny_tokenizer)
    other.eos_token = "<|endoftext|>"
    return other


@pytest.mark.parametrize("stage", [*STAGES, "online_target"])
def test_two_ids_that_mean_other_tokens(
    stage: str, refuses: Callable[..., None], save_draft: Callable[..., Path]
) -> None:
    file = save_draft("draft") / "tokenizer.json"
    data = json.loads(file.read_text(encoding="utf-8"))
    ids = data["model"]["vocab"]
    ids["a"], ids["b"] = ids["b"], ids["a"]
    file.write_text(json.dumps(data), encoding="utf-8")
    refuses(stage, "its vocabulary is not the target's: 2")


@pytest.mark.parametrize("stage", STAGES)
def test_a_padded_head(
    stage: str, refuses: Callable[..., None], save_draft: Callable[..., Path]
) -> None:
    save_draft("draft", vocab_size=320)
    refuses(stage, "the heads score 288 and 320 ids: padding")


@pytest.mark.parametrize("stage", [s for s in STAGES if s != "donor"] + ["online_target"])
def test_another_end(
    stage: str,
    refuses: Callable[..., None],
    save_draft: Callable[..., Path],
    other_end: PreTrainedTokenizerFast,
) -> None:
    save_draft("draft", other_end)
    refuses(stage, r"its EOS token is <\|endoftext\|>")


def test_a_donor_may_have_another_end(
    pair: Pair, save_draft: Callable[..., Path], other_end: PreTrainedTokenizerFast
) -> None:
    save_draft("draft", other_end)
    pair.donor()
    assert AutoTokenizer.from_pretrained(pair.work).eos_token == "<|im_end|>"
