"""What a recipe is said to cost: arithmetic, limits, and agreement with runs that were made."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, LlamaConfig

from fastdraft_hf import FastDraftError
from fastdraft_hf.cli import main as cli
from fastdraft_hf.data.config import GeneratedSet
from fastdraft_hf.evaluation.bench import Setting
from fastdraft_hf.pipeline.plan import calibrate
from fastdraft_hf.pipeline.plan.amounts import bench_answers, evaluation_answers, writings
from fastdraft_hf.pipeline.plan.estimate import (
    Estimator,
    assumed_acceptance,
    block_efficiency,
    chance_of,
    mean_rows,
)
from fastdraft_hf.pipeline.plan.hardware import DEVICES, Hardware, Utilisation, parse_hardware
from fastdraft_hf.pipeline.plan.machines import Measured, Roofline
from fastdraft_hf.pipeline.plan.make import draft_config_of, find_config, make_plan
from fastdraft_hf.pipeline.plan.shapes import Shape, shape_of
from fastdraft_hf.pipeline.recipe import Recipe, build_recipe, read_recipe
from fastdraft_hf.tuning.config import TrimConfig

ROOT = Path(__file__).parents[2]
TARGETS = ROOT / "tests" / "fixtures" / "targets"
QUICKSTART = ROOT / "recipes" / "smollm2-135m" / "quickstart.yaml"
PHI3 = ROOT / "recipes" / "phi-3-mini" / "50m.yaml"

# What a run of the quickstart measured on two quiet CPU cores (2026-11-23): the wall time of each
# stage, and rates out of its own records, except that of writing and of reading prompts, which
# were fitted to it. So this guards the arithmetic; it is no evidence that a plan comes true. Stage
# export has since got its comparisons and is left out.
RATES: dict[str, Any] = {
    "flops": 2e11,
    "bandwidth": 2e10,
    "training": {"pretrain": 2100.0, "continue": 2150.0, "align": 2780.0},
    "write_rate": 930.0,
    "prompt_rate": 3900.0,
    "rounds": {
        ("alone", 0): 0.0459,
        ("ours", 0): 0.0306,
        ("ours", 1): 0.0366,
        ("ours", 5): 0.0601,
        ("transformers", 1): 0.0841,
        ("transformers", 5): 0.1016,
    },
    "first_token": 0.2446,
    "first_token_prompt": 150,
}
TOOK = {
    "design": 2.5,
    "generate": 300.0,
    "pretrain": 23.6,
    "continue": 27.9,
    "align": 212.9,
    "evaluate": 134.0,
    "bench": 199.5,
}


def shapes(recipe: Recipe, config: Path) -> tuple[Shape, Shape]:
    target, _ = find_config(recipe, config)
    return shape_of(target), shape_of(draft_config_of(recipe, target))


def estimator(recipe: Recipe, config: Path, machine: Any, **options: Any) -> Estimator:
    target, draft = shapes(recipe, config)
    options = {"acceptance": 0.134, **options}
    return Estimator(recipe, target, draft, Hardware(1, None), machine, **options)


@pytest.fixture(scope="module")
def quickstart() -> Recipe:
    return read_recipe(QUICKSTART, ["device=cpu"])


class TestTheQuickstart:
    config = TARGETS / "smollm2-135m-instruct.json"

    def test_every_stage_is_within_a_quarter_of_what_it_took(self, quickstart: Recipe) -> None:
        stages = {
            s.stage: s for s in estimator(quickstart, self.config, Measured(**RATES)).stages()
        }
        for name, seconds in TOOK.items():
            assert stages[name].seconds == pytest.approx(seconds, rel=0.25), name
        planned = sum(stages[name].seconds for name in TOOK)
        assert planned == pytest.approx(sum(TOOK.values()), rel=0.1)
        assert stages["generate"].tokens == pytest.approx(236_747, rel=0.1)
        assert stages["generate"].memory_bytes == pytest.approx(2.47e9, rel=0.25)

    def test_limits_in_minutes_hold_on_a_slow_machine(self, quickstart: Recipe) -> None:
        slow = {
            **RATES,
            "training": {k: v / 6 for k, v in RATES["training"].items()},
            "write_rate": 930 / 6,
            "prompt_rate": 3900 / 6,
        }
        stages = {s.stage: s for s in estimator(quickstart, self.config, Measured(**slow)).stages()}
        align = stages["align"]
        assert align.tokens == pytest.approx(60 * 4 * 2780 / 6)
        assert "cut to" in align.notes[0]
        # The limit, the steps that are timed before, evaluation and loading.
        assert 240 < align.seconds < 300
        generate = stages["generate"]
        # One limit for text and code each, two for Magpie, and the texts that were begun.
        assert 60 * (1 + 2.5 * 2 + 2) < generate.seconds < 60 * 16
        assert len([n for n in generate.notes if "max_minutes" in n]) == 4
        assert stages["pretrain"].tokens < 32_000

    def test_without_limits_time_is_proportional_to_the_budget(self, quickstart: Recipe) -> None:
        def align(tokens: str) -> float:
            words = ["device=cpu", "align.max_minutes=null", f"align.max_train_tokens={tokens}"]
            recipe = read_recipe(QUICKSTART, words)
            found = estimator(recipe, self.config, Measured(**RATES)).stages()
            return next(s.seconds for s in found if s.stage == "align")

        assert align("20M") - align("10M") == pytest.approx(10e6 / 2780, rel=0.05)

    def test_a_finished_stage_is_shown_with_its_own_time(
        self, quickstart: Recipe, tmp_path: Path
    ) -> None:
        (tmp_path / "generate").mkdir()
        (tmp_path / "generate" / "provenance.json").write_text('{"wall_seconds": 77.5}')
        found = estimator(quickstart, self.config, Measured(**RATES), folder=tmp_path).stages()
        assert [s.stage for s in found if s.finished] == ["generate"]
        assert next(s.seconds for s in found if s.finished) == 77.5

    def test_an_export_that_is_not_cached_is_added(self, quickstart: Recipe) -> None:
        machine = Measured(**RATES)
        ready = estimator(quickstart, self.config, machine).stages()[1]
        new = estimator(quickstart, self.config, machine, export_ready=False).stages()[1]
        assert new.seconds - ready.seconds == pytest.approx(18.5, abs=0.5)
        assert "once a machine" in new.notes[0]

    def test_the_settings_that_are_timed_are_the_benchmarks(self, quickstart: Recipe) -> None:
        answers = bench_answers(quickstart)
        pytorch = sum(a.count for a in answers if "openvino" not in a.setting.path)
        assert (pytorch, sum(a.count for a in answers) - pytorch) == (60, 30)
        assert sum(a.count for a in evaluation_answers(quickstart)) == 66
        timed = calibrate.ends_of([a.setting for a in answers])
        assert timed == [
            Setting("alone"),
            Setting("ours"),
            Setting("ours", "", 1),
            Setting("ours", "", 5),
            Setting("transformers", "", 1),
            Setting("transformers", "", 5),
        ]

    def test_a_trimmed_draft_is_made_exported_and_timed(self, quickstart: Recipe) -> None:
        more = dataclasses.replace(quickstart, trim=TrimConfig())
        found = [
            {s.stage: s for s in estimator(one, self.config, Measured(**RATES)).stages()}
            for one in (quickstart, more)
        ]
        assert set(found[1]) - set(found[0]) == {"trim"}
        assert 0 < found[1]["trim"].seconds < 120
        for stage in ("export", "bench"):
            assert found[1][stage].seconds > found[0][stage].seconds, stage


class TestThePaper:
    """Phi-3-mini 50M by the paper's recipe took less than a day on eight Gaudi 2."""

    config = TARGETS / "phi-3-mini-4k-instruct.json"

    @pytest.mark.parametrize("utilisation", [0.2, 0.03])
    def test_under_a_day_on_eight_gaudi_2(self, utilisation: float) -> None:
        recipe = read_recipe(PHI3, ["device=cuda"])
        plan = make_plan(
            recipe,
            parse_hardware("8xGaudi2"),
            target_config=self.config,
            utilisation=utilisation,
        )
        assert plan.seconds < 24 * 3600
        tokens = {s.stage: s.tokens for s in plan.stages}
        assert (tokens["pretrain"], tokens["continue"]) == (5e9, 7.5e9)
        assert all(s.memory_bytes < DEVICES["Gaudi2"].memory for s in plan.stages)

    def test_more_devices_and_more_utilisation_are_faster(self) -> None:
        recipe = read_recipe(PHI3, ["device=cuda"])

        def hours(hardware: str, share: float) -> float:
            plan = make_plan(
                recipe, parse_hardware(hardware), target_config=self.config, utilisation=share
            )
            return next(s.seconds for s in plan.stages if s.stage == "pretrain") / 3600

        one, eight = hours("1xH100", 0.2), hours("8xH100", 0.2)
        assert one / eight == pytest.approx(8, rel=0.01)
        assert hours("1xH100", 0.4) == pytest.approx(one / 2, rel=0.01)

    def test_the_flops_of_a_token_are_six_n_and_attention(self) -> None:
        recipe = read_recipe(PHI3, ["device=cuda"])
        _, draft = shapes(recipe, self.config)
        embeddings = draft.parameters - draft.layer_parameters - draft.head_parameters - draft.width
        assert embeddings == 32064 * draft.width
        expected = 6 * (draft.layer_parameters + draft.head_parameters)
        expected += 12 * draft.layers * draft.query * 1024  # half of a context of 2048
        assert draft.train_flops(2048) == expected


def test_shapes_are_counted_from_the_real_model() -> None:
    config = LlamaConfig(
        vocab_size=100,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    shape, model = shape_of(config), AutoModelForCausalLM.from_config(config)
    assert shape.parameters == model.num_parameters()
    assert shape.layer_parameters == sum(p.numel() for p in model.model.layers.parameters())
    assert shape.head_parameters == 1600
    assert (shape.query, shape.key) == (16, 8)
    assert shape.cache_bytes() == 2 * 3 * 8 * 2


def test_forward_flops_agree_with_what_pytorch_counts() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    config = LlamaConfig(
        vocab_size=200,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_implementation="eager",
    )
    model, length = AutoModelForCausalLM.from_config(config).eval(), 48
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, length, dtype=torch.long))
    # Eager attention makes all scores, also those that the mask hides.
    expected = length * shape_of(config).forward_flops(length)
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.03)


class TestHardware:
    @pytest.mark.parametrize(
        ("text", "count", "name"),
        [("8xH100", 8, "H100"), ("gaudi2", 1, "Gaudi2"), ("2×rtx4090", 2, "RTX4090")],
    )
    def test_names(self, text: str, count: int, name: str) -> None:
        found = parse_hardware(text)
        assert found.device is not None
        assert (found.count, found.device.name) == (count, name)
        assert found.name == f"{count}x{name}"

    def test_cpu(self) -> None:
        assert parse_hardware("CPU") == Hardware(1, None)

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("8xH10", r"did you mean 'h100'"),
            ("0xH100", r"is not known"),
            ("lots", r"a number and one of"),
            ("", r"is not known"),
        ],
    )
    def test_others_are_refused(self, text: str, said: str) -> None:
        with pytest.raises(FastDraftError, match=said):
            parse_hardware(text)

    def test_every_device_has_a_source_and_sane_figures(self) -> None:
        for device in DEVICES.values():
            assert device.source
            # FLOPs a byte of bandwidth: between a consumer card and the newest.
            assert 50 < device.flops / device.bandwidth < 600, device.name


@given(st.floats(0.01, 0.95), st.integers(1, 8))
def test_the_chance_a_place_gives_the_rate(rate: float, gamma: int) -> None:
    chance = chance_of(rate, gamma)
    accepted = sum(chance**k for k in range(1, gamma + 1))
    assert accepted / gamma == pytest.approx(rate, abs=1e-6)
    assert block_efficiency(chance, gamma) == pytest.approx(1 + accepted)
    assert 1 <= block_efficiency(chance, gamma) <= gamma + 1


def test_assumed_acceptance_rises_with_the_budget_between_what_is_known() -> None:
    def rate(tokens: str) -> float:
        recipe = build_recipe(
            {"pretrain": {"sources": [{"kind": "python"}], "max_train_tokens": tokens}}
        )
        return assumed_acceptance(recipe)[0]

    assert rate("64k") == 0.134
    assert rate("640k") == 0.134
    assert 0.134 < rate("30M") < rate("1B") < 0.466
    assert rate("12.5B") == rate("50B") == 0.466
    assert assumed_acceptance(build_recipe({}))[0] == 0.134


def test_gains_are_the_formulas(quickstart: Recipe) -> None:
    found = estimator(quickstart, TestTheQuickstart.config, Measured(**RATES)).gains()
    assert [g.num_assistant_tokens for g in found] == [1, 2, 3, 5]
    three = found[2]
    assert three.block_efficiency == pytest.approx(1 + 3 * 0.134, abs=1e-3)
    cost = 11_600_832 / 134_515_008
    assert three.mbsu == pytest.approx((1 + 3 * 0.134) / (3 * cost + 1), abs=1e-3)
    one = found[0]
    assert one.speed["ours"] == pytest.approx(one.block_efficiency * 0.0459 / 0.0366)
    # What the run measured at γ = 1 was 1.41 and 0.69.
    assert one.speed["ours"] == pytest.approx(1.41, rel=0.2)
    assert one.speed["transformers"] == pytest.approx(0.69, rel=0.2)


def test_magpie_is_two_passes_and_samples_multiply() -> None:
    wanted = GeneratedSet(kind="magpie", rows=100, max_new_tokens=200, max_minutes=2)
    instructions, answers = writings("chat", wanted)
    assert (instructions.rows, answers.rows) == (100, 74)
    assert instructions.max_seconds == answers.max_seconds == 120
    assert answers.tokens == 150
    free = writings("text", GeneratedSet(kind="free", rows=10))
    assert [w.rows for w in free] == [10]


def test_rows_that_align_reads_have_their_own_length(quickstart: Recipe) -> None:
    rows = mean_rows(quickstart)
    assert (rows["pretrain"], rows["continue"]) == (256, 256)
    assert rows["align"] == pytest.approx(243, rel=0.1)  # 730 tokens a step of three, measured


class TestRoofline:
    shape = Shape(
        parameters=7_000_000_000,
        layer_parameters=6_500_000_000,
        head_parameters=500_000_000,
        layers=32,
        width=4096,
        inner=14336,
        query=4096,
        key=1024,
        vocabulary=128_000,
    )

    def test_one_text_is_bound_by_memory_and_many_by_flops(self) -> None:
        hardware = parse_hardware("1xH100")
        machine = Roofline(hardware, Utilisation(layer_overhead=0), engine="vllm")
        one = machine.round_seconds(self.shape, self.shape, Setting("alone"))
        assert one == pytest.approx(2 * 7e9 / (3.35e12 * 0.6), rel=0.01)
        seconds = Roofline(
            hardware, Utilisation(layer_overhead=0), batch_size=4096, engine="vllm"
        ).write_seconds(self.shape, 4096, 1, 2)
        flops = 4096 * 2 * self.shape.forward_flops(2) + 4096 * self.shape.forward_flops(0.5)
        assert seconds == pytest.approx(flops / (989e12 * 0.4), rel=0.05)

    def test_waiting_for_the_longest_and_launching_kernels_cost(self) -> None:
        hardware = parse_hardware("1xH100")
        server = Roofline(hardware, engine="vllm").write_seconds(self.shape, 640, 100, 200)
        eager = Roofline(hardware).write_seconds(self.shape, 640, 100, 200)
        assert eager > 2 * server


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


def test_the_command_prints_a_table_or_json(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = ["plan", str(PHI3), "--hardware", "1xRTX4090", f"output_dir={tmp_path}"]
    words += ["--target-config", str(TARGETS / "phi-3-mini-4k-instruct.json")]
    assert cli.main(words) == 0
    said = capsys.readouterr().out
    assert "49,945,088 parameters for microsoft/Phi-3-mini-4k-instruct, 3,821,079,552" in said
    assert "MORE MEMORY THAN A DEVICE HAS" in said  # 256 texts at once do not fit into 24 GB
    assert "RTX4090: 165 TFLOP/s" in said
    assert "γ = 3" in said
    assert cli.main([*words, "--json", "--acceptance", "0.5", "--utilisation", "0.1"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["acceptance"] == 0.5
    assert [s["stage"] for s in plan["stages"]][:3] == ["design", "generate", "pretrain"]
    assert plan["total"]["seconds"] == pytest.approx(sum(s["seconds"] for s in plan["stages"]))
    assert not any(math.isnan(s["flops"]) for s in plan["stages"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--hardware", "9xZ1"], "--hardware: '9xZ1' is not known"),
        (["--hardware", "1xH100", "--utilisation", "2"], "--utilisation: between 0 and 1"),
        (["--hardware", "1xH100", "--acceptance", "0"], "--acceptance: between 0 and 1"),
        (["--utilisation", "0.5"], "--utilisation: a CPU is measured"),
    ],
)
def test_bad_words_are_one_line(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = ["--target-config", str(TARGETS / "smollm2-135m-instruct.json")]
    assert cli.main(["plan", str(QUICKSTART), *config, *words]) == 2
    error = capsys.readouterr().err.strip()
    assert said in error
    assert len(error.splitlines()) == 1


def test_a_cpu_is_calibrated_on_the_recipes_own_steps(
    tiny_target_folder: Path, tmp_path: Path, make_tiny_recipe: Callable[[], Recipe]
) -> None:
    """Real steps and real rounds; how fast they are is not asked."""
    recipe = make_tiny_recipe()
    plan = make_plan(recipe, parse_hardware("cpu"))
    measured = [a for a in plan.assumptions if a.startswith("measured here")]
    for part in ("GFLOP/s", "pretrain:", "align:", "decoding:", "the calibration took"):
        assert any(part in line for line in measured), part
    assert all(s.seconds > 0 for s in plan.stages)
    assert set(plan.gains[0].speed) == {"transformers", "ours"}


@pytest.fixture
def make_tiny_recipe(tiny_target_folder: Path, tmp_path: Path) -> Callable[[], Recipe]:
    def make() -> Recipe:
        stage = {"max_train_tokens": "4k", "seq_length": 32, "per_device_train_batch_size": 2}
        return build_recipe(
            {
                "target": str(tiny_target_folder),
                "output_dir": str(tmp_path / "run"),
                "device": "cpu",
                "design": {"hidden_size": 16, "num_hidden_layers": 1, "first_weights": "scratch"},
                "generate": {
                    "engine": "transformers",
                    "sets": {"chat": {"rows": 8, "max_new_tokens": 16}},
                },
                "pretrain": {"sources": [{"kind": "python"}], **stage},
                "align": {"sources": [{"kind": "generated", "name": "chat"}], **stage},
                "evaluate": {"prompts_per_task": 1, "max_new_tokens": 8},
                "bench": {
                    "prompts_per_task": 1,
                    "max_new_tokens": 8,
                    "paths": ["transformers", "ours"],
                    "num_assistant_tokens": [1, 3],
                },
            }
        )

    return make
