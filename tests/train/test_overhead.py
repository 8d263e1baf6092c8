"""`LimitOverhead`: checkpoints and held-out losses take a small share of a stage."""

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
