"""Reducing a draft's vocabulary: the kept ids, the cost, and the folder; and probes."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedTokenizerFast

from fastdraft_hf import FastDraftError
from fastdraft_hf.data.engines import Completion, Request
from fastdraft_hf.data.generations import read_rows, write_rows
from fastdraft_hf.draft.reduced_vocabulary import load_draft, read_reduced_vocabulary
from fastdraft_hf.eval.expected import TextAcceptance
from fastdraft_hf.tune.config import TuneConfig
from fastdraft_hf.tune.grid import Design
from fastdraft_hf.tune.probe import Probes
from fastdraft_hf.tune.reduced_vocabulary import acceptance_cost, reduce_draft
from fastdraft_hf.tune.texts import held_out, sampled_completions

ROWS = 40
# What the target "writes": few of its 288 tokens, and one that only held-out rows have.
WORDS, RARE = range(100, 140), 287


class Writer:
    """An engine that writes random words of a small vocabulary."""

    def generate(self, requests: Any, on_tokens: Any) -> Any:
        for request in requests:
            rng = random.Random(request.index)
            ids = [rng.choice(WORDS) for _ in range(30)]
            if held_out(request.index):
                ids[0] = RARE
            yield Completion(request, tuple(ids), "length")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rows") / "chat"
    requests = [
        Request(
            index=number,
            source="t",
            prompt_ids=(1, 40 + number),
            max_new_tokens=30,
            temperature=(0.0, 0.6, 1.0)[number % 3],
            seed=number,
        )
        for number in range(ROWS)
    ]
    write_rows(Writer(), requests, folder)
    assert len(read_rows(folder)) == ROWS
    return folder


@pytest.fixture(scope="module")
def draft(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_model: Callable[..., LlamaForCausalLM],
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> Path:
    folder = tmp_path_factory.mktemp("draft") / "draft"
    tiny_model(seed=1).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    (folder / "provenance.json").write_text("{}")
    return folder


def test_a_reduced_folder_and_its_facts(
    rows: Path, draft: Path, tiny_target_folder: Path, tmp_path: Path
) -> None:
    output = tmp_path / "reduced"
    facts = reduce_draft(draft, [rows], 50, output, target=tiny_target_folder, texts=6)
    head = read_reduced_vocabulary(output)
    assert head is not None
    assert len(head.token_ids) == 50
    assert set(WORDS) <= set(head.token_ids)
    assert RARE not in head.token_ids  # held-out rows are not counted
    assert head.facts == facts
    assert facts["held_out_tokens"] == 30 * (ROWS // 5)
    assert facts["coverage"] == pytest.approx(29 / 30)
    rates = facts["acceptance_rate"]
    for rate in rates.values():
        assert rate[1] <= rate[0] <= rate[2]
    assert rates["difference"][0] == pytest.approx(rates["reduced"][0] - rates["full"][0])
    # A draft whose tokens the target never takes loses nothing by leaving them out, but its
    # probabilities grow where they are left.
    assert rates["difference"][0] > -rates["full"][0]
    assert not (output / "provenance.json").exists()  # the original's
    full = AutoModelForCausalLM.from_pretrained(output).state_dict()
    for name, tensor in AutoModelForCausalLM.from_pretrained(draft).state_dict().items():
        assert torch.equal(tensor, full[name])
    assert load_draft(output).get_output_embeddings().weight.shape[0] == 50


def test_the_cost_is_that_of_what_is_left_out() -> None:
    """Half of the positions can no longer be accepted.

    At γ = 1 a round from a good position is accepted with 0.8 and the next starts at a good one;
    else one round from a bad position follows, where nothing is accepted. 0.8 of 1.2 rounds.
    """
    full = [TextAcceptance((0.8,) * 12, (0.8,) * 12, (0.0,) * 12) for _ in range(4)]
    reduced = [TextAcceptance((0.8, 0.0) * 6, (0.8, 0.0) * 6, (0.0,) * 12) for _ in range(4)]
    cost = acceptance_cost(full, reduced, 1)["acceptance_rate"]
    assert cost["full"][0] == pytest.approx(0.8)
    assert cost["reduced"][0] == pytest.approx(0.8 / 1.2)
    assert cost["difference"][2] < 0
    same = acceptance_cost(full, full, 3)["acceptance_rate"]
    assert same["difference"] == [0.0, 0.0, 0.0]


def test_texts_are_held_out_and_sampled(rows: Path) -> None:
    texts = sampled_completions([rows], 100, 0)
    assert texts
    for text, temperature in texts:
        number = text.prompt_ids[1] - 40
        assert held_out(number)
        assert temperature in (0.6, 1.0)
        assert text.ids[0] == RARE
    assert sampled_completions([rows], 2, 0) == texts[:2]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"size": 3}, "draft_vocab_size: 3 must be more than"),
        ({"size": 288}, "below the vocabulary of 288"),
        ({"sets": []}, "the generated sets hold no completions"),
        ({"sets": [Path("nowhere")]}, "nowhere"),
        ({"draft": Path("nowhere")}, "draft: nowhere is not a folder"),
    ],
)
def test_what_cannot_be_is_refused_and_leaves_nothing(
    rows: Path,
    draft: Path,
    tiny_target_folder: Path,
    tmp_path: Path,
    change: dict[str, Any],
    words: str,
) -> None:
    given: dict[str, Any] = {"draft": draft, "sets": [rows], "size": 50, **change}
    with pytest.raises(FastDraftError, match=words):
        reduce_draft(**given, folder=tmp_path / "t", target=tiny_target_folder)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_probes_train_and_are_kept(
    rows: Path, tiny_target_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real trainer on the real rows; a second call measures nothing again."""
    from fastdraft_hf.target.resolve import Target

    config = TuneConfig(
        params=30_000,
        width_multiple=8,
        probe_tokens=4096,
        rows=[str(rows)],
        max_num_assistant_tokens=2,
    )
    target = Target(tiny_target_folder, "tiny")
    designs = [Design(1, 32, 64, 0), Design(2, 32, 64, 0)]
    found = Probes(config, target, tmp_path, [1, 2])(designs)
    assert set(found) == {"1x32", "2x32"}
    assert all(1 <= tokens[1] <= tokens[2] <= 3 for tokens in found.values())
    saved = json.loads((tmp_path / "probes.json").read_text())
    assert len(saved) == 2
    assert not [p for p in (tmp_path / "probes").iterdir() if p.name.startswith("1x32")]
    monkeypatch.setattr(Probes, "_trained", None)
    assert Probes(config, target, tmp_path, [1, 2])(designs) == found


def test_the_command_reduces_any_draft(
    rows: Path,
    draft: Path,
    tiny_target_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from fastdraft_hf.cli.main import main

    output = tmp_path / "reduced"
    words = ["vocabulary", str(tiny_target_folder), str(draft)]
    for further, said in (
        (["--reduce", "many"], "draft_vocab_size: expected a whole number, got 'many'"),
        (["--reduce", "50"], "--reduce needs --sets"),
        (["--output", str(output)], "--sets and --output need --reduce N"),
    ):
        assert main([*words, *further]) == 2
        assert said in capsys.readouterr().err
    assert main([*words, "--reduce", "50", "--sets", str(rows), "--output", str(output)]) == 0
    assert f"written to {output}" in capsys.readouterr().out
    head = read_reduced_vocabulary(output)
    assert head is not None
    assert len(head.token_ids) == 50
    record = json.loads((output / "provenance.json").read_text(encoding="utf-8"))
    assert record["draft"] == str(draft)
