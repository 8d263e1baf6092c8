"""Checkpoints and held-out losses take a small share of a stage, and a stage its minutes."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import TrainerControl

from fastdraft_hf.train import callbacks


@pytest.mark.parametrize(("saving", "evaluating"), [(10.0, 4.0), (10.0, 0.01), (0.01, 0.01)])
def test_the_dear_ones_are_rare(
    monkeypatch: pytest.MonkeyPatch, saving: float, evaluating: float
) -> None:
    now = 0.0
    monkeypatch.setattr(callbacks.time, "monotonic", lambda: now)
    rule, control = callbacks.LimitOverhead(), TrainerControl()
    spent = {"save": 0.0, "evaluate": 0.0}
    for step in range(1, 2001):
        rule.on_step_begin(None, None, control)
        now += 1.0
        control.should_save = control.should_evaluate = step % 5 == 0
        control.should_training_stop = step == 2000
        rule.on_step_end(None, None, control)
        if control.should_evaluate:
            now += evaluating
            spent["evaluate"] += evaluating
            rule.on_evaluate(None, None, control)
        if control.should_save:
            now += saving
            spent["save"] += saving
    assert control.should_save
    assert control.should_evaluate
    for name, took in (("save", saving), ("evaluate", evaluating)):
        if took > 1:
            assert 0.02 * now < spent[name] < 0.06 * now
        else:
            assert spent[name] == pytest.approx(400 * took)


@pytest.mark.parametrize("evaluating", [0.0, 40.0])
@pytest.mark.parametrize("slow", [range(0), range(30, 90), range(200, 2000)])
def test_a_stage_uses_its_minutes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, evaluating: float, slow: range
) -> None:
    """Evaluations take long, or other work slows some steps down: the time is still filled."""
    now = 0.0
    monkeypatch.setattr(callbacks.time, "monotonic", lambda: now)
    args = SimpleNamespace(output_dir=tmp_path, max_train_tokens=10**9, max_minutes=10)
    state = SimpleNamespace(global_step=0, num_input_tokens_seen=0, is_world_process_zero=True)
    control = TrainerControl()
    rules = [callbacks.TimeBudget(), callbacks.LimitOverhead()]
    rules[0].on_train_begin(args, state, control)
    while state.num_input_tokens_seen < args.max_train_tokens:
        for rule in rules:
            rule.on_step_begin(args, state, control)
        now += 2.0 if state.global_step in slow else 0.5
        state.global_step += 1
        state.num_input_tokens_seen += 1000
        control.should_evaluate = state.global_step % 50 == 0
        for rule in rules:
            rule.on_step_end(args, state, control)
        if control.should_evaluate:
            now += evaluating
            for rule in rules:
                rule.on_evaluate(args, state, control)
    assert 540 < now + evaluating < 630
