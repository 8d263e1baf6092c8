"""The search with a clock of its own, so that the best is known; and real rounds of tiny models."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fastdraft_hf import FastDraftError
from fastdraft_hf.cli import main as cli
from fastdraft_hf.draft.design import design_draft
from fastdraft_hf.draft.families import count_parameters
from fastdraft_hf.recipe import build_recipe
from fastdraft_hf.target.resolve import Target
from fastdraft_hf.tune import search as searching
from fastdraft_hf.tune.config import TuneConfig
from fastdraft_hf.tune.search import designs_of, recipe_snippet, search, table, verdict

PARAMS = 250_000


@pytest.fixture(scope="module")
def target(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_model: Callable[..., LlamaForCausalLM],
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> Target:
    """Deep and wide enough for a choice of designs."""
    folder = tmp_path_factory.mktemp("tuning") / "target"
    tiny_model(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=8,
        max_position_embeddings=1024,
    ).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return Target(folder, "tiny")


def settings(**given: Any) -> TuneConfig:
    return TuneConfig(
        **{
            "params": PARAMS,
            "depths": [1, 2, 4],
            "max_num_assistant_tokens": 4,
            "context": 16,
            "rounds": 1,
            "repeats": 2,
            **given,
        }
    )


class Clock:
    """A machine on which drafting a token takes 1 ms and 0.5 ms per layer, verification 11 ms."""

    def __init__(self) -> None:
        self.measured: list[tuple[str, int]] = []

    def measure(self, draft: Path, repeat: int) -> dict[int, list[float]]:
        self.measured.append((draft.name, repeat))
        layers = int(draft.name.split("x")[0])
        return {g: [1e-3 * (g * (1 + layers / 2) + 11)] for g in (1, 2, 3, 4)}


def timed(
    config: TuneConfig, target: Target, folder: Path, make_timer: Callable[[], Clock] = Clock
) -> dict[str, Any]:
    """Search with another clock."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(searching, "LoopTimer", lambda *given: make_timer())
        return search(config, target, folder)


def test_the_grid_fills_one_budget_exactly(target: Target) -> None:
    config = LlamaConfig.from_pretrained(target.path)
    asked = settings(widths_per_depth=3)
    designs = designs_of(config, asked)
    assert {d.num_hidden_layers for d in designs.values()} == {1, 2, 4}
    assert len(designs) > 3
    for design in designs.values():
        assert abs(count_parameters(design_draft(config, design)) - PARAMS) <= 0.02 * PARAMS


@pytest.mark.parametrize(
    ("alphas", "layers"),
    [
        ({"1": 0.5, "2": 0.5, "4": 0.5}, 1),  # nothing gained by depth
        ({"1": 0.3, "2": 0.6, "4": 0.62}, 2),  # an inverted U
        ({"1": 0.1, "2": 0.3, "4": 0.9}, 4),
    ],
)
def test_the_best_is_the_best_of_a_known_machine(
    target: Target, tmp_path: Path, alphas: dict[str, float], layers: int
) -> None:
    results = timed(settings(acceptance=alphas), target, tmp_path)
    best = results["best"]

    def speed(depth: int, gamma: int) -> float:
        alpha = alphas[str(depth)]
        emitted = sum(alpha**n for n in range(gamma + 1))
        return emitted / (1e-3 * (gamma * (1 + depth / 2) + 10 + 1))

    wanted = max((speed(d, g), d, g) for d in (1, 2, 4) for g in (1, 2, 3, 4))
    assert wanted[1] == layers
    assert best["tokens_per_second"] == pytest.approx(wanted[0])
    assert (best["section"]["num_hidden_layers"], best["num_assistant_tokens"]) == wanted[1:]
    assert json.loads((tmp_path / "results.json").read_text()) == results
    assert [row[""] for row in table(results)].count("→") == 1
    assert ("cheapest draft wins" in verdict(results)) is (len(set(alphas.values())) == 1)


def test_a_killed_search_times_only_what_is_missing(target: Target, tmp_path: Path) -> None:
    class Killed(Clock):
        def measure(self, draft: Path, repeat: int) -> dict[int, list[float]]:
            if len(self.measured) == 4:
                raise KeyboardInterrupt
            return super().measure(draft, repeat)

    killed, again, whole = Killed(), Clock(), Clock()
    config = settings(acceptance=0.5)
    with pytest.raises(KeyboardInterrupt):
        timed(config, target, tmp_path / "a", lambda: killed)
    results = timed(config, target, tmp_path / "a", lambda: again)
    assert timed(config, target, tmp_path / "b", lambda: whole) == results
    assert killed.measured + again.measured == whole.measured
    half = len(whole.measured) // 2
    first, second = (
        [n for n, _ in part] for part in (whole.measured[:half], whole.measured[half:])
    )
    assert sorted(first) == sorted(second)
    assert first != second  # each repeat has an order of its own

    def never() -> Clock:
        raise AssertionError("everything was timed")

    other = timed(settings(acceptance=0.9), target, tmp_path / "a", never)
    assert other["best"]["tokens_per_second"] > results["best"]["tokens_per_second"]
    with pytest.raises(AssertionError):  # another context is another timing
        timed(settings(context=17), target, tmp_path / "a", never)
    (tmp_path / "a" / "timings.json").write_text("[" * 100_000)
    with pytest.raises(FastDraftError, match=r"timings\.json is damaged: not valid JSON"):
        timed(config, target, tmp_path / "a", never)


def test_the_acceptance_of_probes_is_used(
    target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def prober(designs: Any) -> dict[str, dict[int, float]]:
        asked.extend(designs)
        return {name: {g: 1 + 0.1 * int(name[0]) * g for g in (1, 2, 3, 4)} for name in designs}

    config = settings(probe_tokens=1000, rows=["somewhere"])
    monkeypatch.setattr(searching, "Probes", lambda *given: prober)
    results = timed(config, target, tmp_path)
    assert asked == [row["design"] for row in results["designs"]]
    deep = next(row for row in results["designs"] if row["design"].startswith("4x"))
    assert deep["tokens_per_second"]["4"] == pytest.approx(2.6 / (1e-3 * (4 * 3 + 11)))
    assert "short trainings" in verdict(results)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"acceptance": {"1": 0.4, "2": 0.4}}, "acceptance: needs one number .* see 4"),
        ({"depths": [9]}, "depths: 9 is deeper than the target's 8"),
        ({"params": 1000, "depths": None}, "design.params: 1,000 cannot hold a vocabulary"),
        ({"context": 1000}, "context: timing from 1000 tokens reads up to"),
        ({"probe_tokens": 5000, "rows": ["nowhere"]}, "nowhere"),
    ],
)
def test_what_cannot_be_is_said_before_any_work(
    target: Target, tmp_path: Path, given: dict[str, Any], words: str
) -> None:
    folder = tmp_path / "out"
    with pytest.raises(FastDraftError, match=words):
        timed(settings(**given), target, folder)
    assert not folder.exists()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"acceptance": {1: 1.5}}, r"acceptance\[1\]: must be at most 1"),
        ({"depths": [0]}, r"depths\[0\]: must be at least 1"),
        ({"probe_tokens": 100}, "rows: probes need"),
        ({"probe_tokens": 100, "rows": ["x"], "acceptance": 0.4}, "acceptance: give it or"),
    ],
)
def test_settings_that_cannot_be(given: dict[str, Any], words: str) -> None:
    with pytest.raises(FastDraftError, match=words):
        settings(**given)


def test_real_rounds_are_timed(target: Target, tmp_path: Path) -> None:
    """Every γ as often as requested."""
    config = settings(depths=[1, 2], acceptance=0.5, rounds=2)
    results = search(config, target, tmp_path)
    saved = json.loads((tmp_path / "timings.json").read_text())
    assert len(saved) == 2 * len(results["designs"])
    for rounds in saved.values():
        assert set(rounds) == {"1", "2", "3", "4"}
        assert all(len(times) == 2 and min(times) > 0 for times in rounds.values())
    assert results["best"]["tokens_per_second"] > 0


def test_the_command_prints_the_sections_of_a_recipe(
    target: Target,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(searching, "LoopTimer", lambda *args: Clock())
    words = ["tune", str(target.path), "--output-dir", str(tmp_path), "params=250k"]
    words += ["depths=[1, 2, 4]", "max_num_assistant_tokens=4", "context=16"]
    assert cli.main([*words, "acceptance={1: 0.3, 2: 0.6, 4: 0.62}"]) == 0
    printed = capsys.readouterr()
    results = json.loads((tmp_path / "results.json").read_text())
    assert printed.out == recipe_snippet(results)
    recipe = build_recipe(yaml.safe_load(printed.out))
    assert recipe.design.num_hidden_layers == 2
    assert results["best"]["num_assistant_tokens"] in recipe.bench.num_assistant_tokens
    assert "best at acceptance 0.600" in printed.err
