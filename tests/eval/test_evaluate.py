"""An evaluation of tiny models: complete, resumable, and the same for any number of processes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from fastdraft_hf import _processes
from fastdraft_hf.decode.records import DecodingRecord
from fastdraft_hf.eval import evaluate
from fastdraft_hf.eval.config import EvaluateConfig
from fastdraft_hf.eval.evaluate import ALONE, GREEDY, SAMPLED, UNTRAINED, Setting
from fastdraft_hf.eval.journal import Journal
from fastdraft_hf.eval.metrics import acceptance_rate, block_efficiency
from fastdraft_hf.eval.prompts import EvaluationPrompt

Models = tuple[LlamaForCausalLM, LlamaForCausalLM, LlamaForCausalLM]

PROMPTS = [
    EvaluationPrompt("humaneval", "H/0", (40, 41, 42)),
    EvaluationPrompt("ifbench", "7", (90, 33)),
    EvaluationPrompt("humaneval", "H/1", (50, 60, 70, 80)),
    EvaluationPrompt("ifbench", "8", (20, 21, 22)),
]
CONFIG = EvaluateConfig(
    max_new_tokens=6,
    num_assistant_tokens=[2, 4],
    temperature=[0.0, 5.0, 9.0],
    untrained_prompts_per_task=1,
)
# Of each prompt: alone, greedy and two temperatures at both γ. Of each task's first, untrained.
RUNS = len(PROMPTS) * (1 + 2 + 4) + 2


@pytest.fixture(scope="module")
def models(tiny_model: Callable[..., LlamaForCausalLM]) -> Models:
    """The target, the draft, and the draft before training."""
    return tiny_model(seed=0), tiny_model(seed=1, num_hidden_layers=1), tiny_model(seed=2)


def run(models: Models, folder: Path, config: EvaluateConfig = CONFIG) -> Any:
    folder.mkdir(exist_ok=True)
    target, draft, untrained = models
    return evaluate.evaluate(target, draft, PROMPTS, config, folder, seed=3, untrained=untrained)


@pytest.fixture(scope="module")
def measured(
    models: Models, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Journal, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("evaluated")
    results = run(models, folder)
    assert [path.name for path in folder.iterdir()] == ["records.jsonl"]
    return Journal(folder / "records.jsonl"), json.loads(json.dumps(results))


def test_every_setting_has_its_figures(
    models: Models,
    measured: tuple[Journal, dict[str, Any]],
) -> None:
    records, result = measured
    assert len(records) == RUNS
    assert result["prompts"] == {"drawn": 4, "measured": 4}
    assert (result["greedy_prompts"], result["greedy_identical"]) == (4, 4)
    sizes = result["draft_parameters"], result["target_parameters"]
    assert sizes == (models[1].num_parameters(), models[0].num_parameters())
    assert result["cost_ratio"] == sizes[0] / sizes[1]
    assert list(result["tasks"]) == ["humaneval", "ifbench"]
    found = [(s["num_assistant_tokens"], s["temperature"]) for s in result["settings"]]
    assert found == [(2, 5.0), (4, 5.0), (2, 9.0), (4, 9.0), (2, 0.0), (4, 0.0)]
    for setting in result["settings"]:
        gamma, temperature = setting["num_assistant_tokens"], setting["temperature"]
        way = Setting(SAMPLED if temperature else GREEDY, gamma, temperature)
        for figures, prompts in (
            (setting["tasks"]["humaneval"], PROMPTS[::2]),
            (setting["tasks"]["ifbench"], PROMPTS[1::2]),
            (setting["overall"], PROMPTS),
        ):
            taken = [records[way.label(p)] for p in prompts]
            assert {(r.temperature, r.num_assistant_tokens) for r in taken} == {
                (temperature, gamma)
            }
            assert figures["prompts"] == len(prompts)
            assert figures["acceptance_rate"][0] == acceptance_rate(taken)
            value, low, high = figures["block_efficiency"]
            assert value == block_efficiency(taken)
            assert low <= value <= high <= gamma + 1
            cost = result["cost_ratio"] * gamma + 1
            assert figures["mbsu"] == pytest.approx([value / cost, low / cost, high / cost])
        assert ("expected" in setting["overall"]) == (temperature > 0)
        if expected := setting["overall"].get("expected"):
            value, low, high = expected["acceptance_rate"]
            assert 0 <= low <= value <= high <= 1
    # Single figures are those of the first γ and temperature.
    assert (result["num_assistant_tokens"], result["temperature"]) == (2, 5.0)
    assert result["overall"][SAMPLED] == result["settings"][0]["overall"]
    assert result["tasks"]["ifbench"][GREEDY] == result["settings"][4]["tasks"]["ifbench"]
    before = result["overall"][UNTRAINED]
    assert before["prompts"] == 2
    # The gain is of the prompts that were measured before training, the first of each task.
    after = acceptance_rate([records[Setting(SAMPLED, 2, 5.0).label(p)] for p in PROMPTS[:2]])
    value, low, high = before["gain"]
    assert value == pytest.approx(after - before["acceptance_rate"][0])
    assert low <= value <= high


def counting(monkeypatch: pytest.MonkeyPatch, stop_after: int = 10**9) -> list[str]:
    """Return the list that gets the key of every answer decoded; it dies after so many."""
    made: list[str] = []
    decode = evaluate.decode

    def counted(*args: Any, **kwargs: Any) -> DecodingRecord:
        if kwargs["task"] != "warm-up":
            if len(made) == stop_after:
                raise KeyboardInterrupt
            made.append(kwargs["key"])
        return decode(*args, **kwargs)

    monkeypatch.setattr(evaluate, "decode", counted)
    return made


def test_a_killed_evaluation_resumes(
    models: Models,
    measured: tuple[Journal, dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patch:
        before = counting(patch, stop_after=11)
        with pytest.raises(KeyboardInterrupt):
            run(models, tmp_path)
    after = counting(monkeypatch)
    results = run(models, tmp_path)
    assert len(before) + len(after) == RUNS
    # The seed is the prompt's own, so a resumed run samples the same answers.
    assert json.loads(json.dumps(results)) == measured[1]
    after.clear()
    assert run(models, tmp_path) == results
    assert after == []


def as_rank(monkeypatch: pytest.MonkeyPatch, second: Callable[[], Any]) -> list[int]:
    """Play two processes in one: the second runs while the first waits at its first barrier.

    So both have read the folder before either writes, as real barriers see to.
    """
    rank, met = [0], []

    def barrier() -> None:
        if not met:
            met.append(1)
            rank[0] = 1
            assert second() is None
            rank[0] = 0

    monkeypatch.setattr(_processes, "rank", lambda: rank[0])
    monkeypatch.setattr(_processes, "world", lambda: 2)
    monkeypatch.setattr(_processes, "is_main", lambda: rank[0] == 0)
    monkeypatch.setattr(_processes, "barrier", barrier)
    return rank


def test_two_processes_share_the_prompts(
    models: Models,
    measured: tuple[Journal, dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = counting(monkeypatch)
    as_rank(monkeypatch, lambda: run(models, tmp_path))
    results = run(models, tmp_path)
    assert len(made) == RUNS
    # The second process, which was first here, has every second prompt.
    assert set(made[: RUNS // 2]) == {"7", "8"}
    assert json.loads(json.dumps(results)) == measured[1]
    assert [path.name for path in tmp_path.iterdir()] == ["records.jsonl"]


def test_a_time_limit_leaves_one_prompt(models: Models, tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"max_minutes": 1e-9})
    results = run(models, tmp_path, config)
    assert results["prompts"] == {"drawn": 4, "measured": 1}
    assert results["greedy_prompts"] == 1
    assert results["tasks"]["humaneval"][SAMPLED]["prompts"] == 1
    # Without the limit the others are added.
    assert run(models, tmp_path)["prompts"] == {"drawn": 4, "measured": 4}


def test_when_time_is_short_acceptance_is_measured_first(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passed = 0.0

    def decoded(*args: Any, **kwargs: Any) -> DecodingRecord:
        nonlocal passed
        passed += 60.0
        return decode(*args, **kwargs)

    decode = evaluate.decode
    monkeypatch.setattr(evaluate, "decode", decoded)
    monkeypatch.setattr(evaluate.time, "monotonic", lambda: passed)
    # The first prompt's 8 runs and 2 warm-ups, and 4 sampled runs of each other one.
    results = run(models, tmp_path, CONFIG.model_copy(update={"max_minutes": 21.0}))
    assert results["prompts"] == {"drawn": 4, "measured": 4}
    assert results["greedy_prompts"] == 1
    assert results["overall"][SAMPLED]["prompts"] == 4
    assert results["overall"][GREEDY]["prompts"] == 1


def answers(
    make_record: Callable[..., DecodingRecord], *tokens: list[int]
) -> dict[str, DecodingRecord]:
    """Records of the first prompt: alone, then greedy at γ = 2 and 4."""
    ways = (Setting(ALONE), Setting(GREEDY, 2), Setting(GREEDY, 4))
    return {
        way.label(PROMPTS[0]): make_record(tokens=one, target_passes=1)
        for way, one in zip(ways, tokens, strict=True)
    }


def differences(target: Any, records: dict[str, DecodingRecord]) -> list[dict[str, Any]]:
    found = evaluate.compare_greedy(target, PROMPTS[:1], CONFIG, records)
    assert (found["greedy_prompts"], found["greedy_identical"]) == (
        1,
        1 - len(found["greedy_differences"]),
    )
    differences: list[dict[str, Any]] = found["greedy_differences"]
    return differences


def test_a_planted_difference_is_a_fault(
    models: Models, make_record: Callable[..., DecodingRecord]
) -> None:
    records = answers(make_record, [5, 6, 7, 8], [5, 6, 9, 8], [5, 6, 7, 8])
    (found,) = differences(models[0], records)
    assert (found["task"], found["key"], found["position"]) == ("humaneval", "H/0", 2)
    with torch.no_grad():
        logits = models[0](input_ids=torch.tensor([[*PROMPTS[0].ids, 5, 6]])).logits[0, -1]
    first, second = logits.topk(2).values.tolist()
    assert found["margin"] == pytest.approx(first - second, abs=1e-4)
    assert found["tie"] is False


def test_a_difference_at_a_tie_is_called_one(
    tiny_model: Callable[..., LlamaForCausalLM], make_record: Callable[..., DecodingRecord]
) -> None:
    target: Any = tiny_model(seed=0)
    with torch.no_grad():  # all logits zero: every token is as good as every other
        target.get_output_embeddings().weight.zero_()
    records = answers(make_record, [5, 6], [5, 7], [5, 6])
    (found,) = differences(target, records)
    assert (found["position"], found["margin"], found["tie"]) == (1, 0.0, True)
    # One entry per prompt, and a fault comes first: the report counts prompts.
    records = answers(make_record, [5, 6], [5, 7], [5])
    (found,) = differences(target, records)
    assert (found["num_assistant_tokens"], found["position"], found["tie"]) == (4, None, False)
    records = answers(make_record, [5, 6], [5, 6], [5, 6])
    assert differences(target, records) == []
