"""Probes: held-out completions, and short trainings that are kept."""

from pathlib import Path
from typing import Any

import pytest

from fastdraft_hf.data.engines import Completion, Request
from fastdraft_hf.data.parts import write_rows
from fastdraft_hf.draft.config import DesignConfig
from fastdraft_hf.target.resolve import Target
from fastdraft_hf.tune.config import TuneConfig
from fastdraft_hf.tune.probe import Probes, held_out, sampled_completions


class Writer:
    """An engine that repeats one token in each row."""

    def generate(self, requests: Any, on_tokens: Any) -> Any:
        for request in requests:
            yield Completion(request, (100 + request.index,) * 30, "length")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rows") / "chat"
    requests = [Request(n, (1, 40 + n), (0.0, 0.6, 1.0)[n % 3], n, 30, "t") for n in range(40)]
    write_rows(Writer(), requests, folder)
    return folder


def test_texts_are_held_out_and_sampled(rows: Path) -> None:
    texts = sampled_completions([rows], 100)
    assert texts
    for text, temperature in texts:
        number = text.prompt_ids[1] - 40
        assert held_out(number)
        assert text.ids[0] == 100 + number
        assert temperature in (0.6, 1.0)
    assert len(sampled_completions([rows], 2)) == 2


@pytest.mark.slow
def test_probes_train_and_are_kept(
    rows: Path, tiny_target_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real trainer on the real rows; a second call measures nothing again."""
    config = TuneConfig(params=30_000, probe_tokens=4096, rows=[str(rows)])
    target = Target(tiny_target_folder, "tiny")
    given: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "init": "scratch"}
    designs = {f"{depth}x32": DesignConfig(num_hidden_layers=depth, **given) for depth in (1, 2)}
    found = Probes(config, target, tmp_path, [1, 2])(designs)
    assert set(found) == set(designs)
    assert all(1 <= tokens[1] <= tokens[2] <= 3 for tokens in found.values())
    assert len(list((tmp_path / "probes").glob("*.json"))) == 2
    assert not [p for p in (tmp_path / "probes").iterdir() if p.name.endswith("x32")]
    monkeypatch.setattr(Probes, "_train", None)
    assert Probes(config, target, tmp_path, [1, 2])(designs) == found
