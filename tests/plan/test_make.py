"""Plans of whole recipes, and the target's config."""

from __future__ import annotations

from pathlib import Path

import pytest
from planning import PHI3, PHI3_TARGET, TARGETS

from fastdraft_hf import FastDraftError
from fastdraft_hf.plan.hardware import DEVICES, parse_hardware
from fastdraft_hf.plan.make import find_config, make_plan
from fastdraft_hf.recipe import build_recipe, read_recipe


@pytest.mark.parametrize("utilisation", [0.2, 0.03])
def test_under_a_day_on_eight_gaudi_2(utilisation: float) -> None:
    recipe = read_recipe(PHI3, ["device=cuda"])
    plan = make_plan(
        recipe,
        parse_hardware("8xGaudi2"),
        target_config=PHI3_TARGET,
        utilisation=utilisation,
    )
    assert plan.seconds < 24 * 3600
    tokens = {s.stage: s.tokens for s in plan.stages}
    assert (tokens["pretrain"], tokens["continue"]) == (5e9, 7.5e9)
    assert all(s.memory_bytes < DEVICES["Gaudi2"].memory for s in plan.stages)


def test_more_devices_and_more_utilisation_are_faster() -> None:
    recipe = read_recipe(PHI3, ["device=cuda"])

    def hours(hardware: str, share: float) -> float:
        plan = make_plan(
            recipe, parse_hardware(hardware), target_config=PHI3_TARGET, utilisation=share
        )
        return next(s.seconds for s in plan.stages if s.stage == "pretrain") / 3600

    one, eight = hours("1xH100", 0.2), hours("8xH100", 0.2)
    assert one / eight == pytest.approx(8, rel=0.01)
    assert hours("1xH100", 0.4) == pytest.approx(one / 2, rel=0.01)


class TestTheConfigOfTheTarget:
    def test_a_folder_with_only_a_config_is_enough(self, tmp_path: Path) -> None:
        source = TARGETS / "qwen3-8b.json"
        (tmp_path / "config.json").write_text(source.read_text())
        recipe = build_recipe({"target": str(tmp_path), "design": {"params": "150M"}})
        config, folder = find_config(recipe)
        assert config.num_hidden_layers == 36
        assert folder is None  # no weights
        assert find_config(build_recipe({}), source)[0].hidden_size == 4096

    @pytest.mark.parametrize(
        ("text", "said"),
        [("{", "no valid JSON"), ("{}", "model_type none"), ('{"model_type": "zz"}', "zz cannot")],
    )
    def test_bad_files(self, text: str, said: str, tmp_path: Path) -> None:
        file = tmp_path / "config.json"
        file.write_text(text)
        with pytest.raises(FastDraftError, match=said):
            find_config(build_recipe({}), file)

    def test_a_hub_id_without_network_says_what_to_give(self) -> None:
        with pytest.raises(FastDraftError, match=r"out of reach; give its config\.json with --tar"):
            find_config(build_recipe({"target": "someone/some-model"}))
        with pytest.raises(FastDraftError, match="is no config"):
            find_config(build_recipe({}), Path("/nowhere/config.json"))
