"""The audit finds a wrong sampling rule, and passes a right one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from fastdraft_hf.cli.main import main
from fastdraft_hf.eval.audit import Audit, audit, generate_sampler, samples_needed

PROMPTS = [[40, 41, 42], [50, 51], [60]]


@pytest.fixture(scope="module")
def pair(tiny_model: Callable[..., LlamaForCausalLM]) -> tuple[Any, Any]:
    """A target whose distributions are spread over a few tokens, and another model."""

    def flat(seed: int) -> LlamaForCausalLM:
        model = tiny_model(seed, eos_token_id=None)
        model.generation_config.eos_token_id = None
        with torch.no_grad():
            model.model.norm.weight.mul_(4.0)
        return model

    return flat(0), flat(1)


def keeps_a_tenth_unseen(target: Any, draft: Any) -> Callable[..., Iterable[Sequence[int]]]:
    """A rule that keeps a tenth of the drafted tokens without looking at the target."""
    right = generate_sampler(target, None, 1, stock=True)
    wrong = generate_sampler(draft, None, 1, stock=True)

    def sample(prompt: Sequence[int], seeds: Sequence[int]) -> Iterable[Sequence[int]]:
        cut = len(seeds) // 10
        yield from wrong(prompt, seeds[:cut])
        yield from right(prompt, seeds[cut:])

    return sample


def judged(target: Any, sample: Any, samples: int) -> Audit:
    return audit(target, sample, PROMPTS, samples, "audit")


def test_our_rule_passes_and_a_wrong_one_does_not(pair: tuple[Any, Any]) -> None:
    target, draft = pair
    samples = samples_needed(0.06)
    assert judged(target, generate_sampler(target, draft, 3, stock=False), samples).passed
    found = judged(target, keeps_a_tenth_unseen(target, draft), samples)
    assert not found.passed
    assert found.distance > 2 * found.by_chance


def test_more_samples_find_a_smaller_distance() -> None:
    assert samples_needed(0.01) == pytest.approx(4 * samples_needed(0.02), rel=0.01)


def test_command(
    pair: tuple[Any, Any],
    tiny_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, model in zip(("target", "draft"), pair, strict=True):
        model.save_pretrained(tmp_path / name)
        tiny_tokenizer.save_pretrained(tmp_path / name)
    words = ["audit", "--target", str(tmp_path / "target"), "--draft", str(tmp_path / "draft")]
    assert main([*words, "--distance", "0.2"]) == 0
    assert capsys.readouterr().out.count(": as the target") == 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--engine", "vllm"], "--server: engines vllm and llama.cpp need it"),
        (["--server", "http://127.0.0.1:8000"], "--server: engines vllm"),
        (["--distance", "0"], "--distance: must be"),
        (["--num-assistant-tokens", "0"], "--num-assistant-tokens: must be"),
    ],
)
def test_bad_input(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["audit", "--target", "nowhere", "--draft", "nowhere", *words]) == 2
    assert said in capsys.readouterr().err
