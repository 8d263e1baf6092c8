from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard, ModelCardData

from fastdraft_hf._errors import FastDraftError
from fastdraft_hf.eval.report import card_preview
from fastdraft_hf.eval.summary import SPEED_NOTE, RunSummary, settings_of
from fastdraft_hf.hub.card import (
    OpenVINOCopy,
    best_num_assistant_tokens,
    render_card,
    template_path,
)
from fastdraft_hf.hub.metadata import check_metadata


def render(summary: RunSummary, **given: Any) -> ModelCard:
    fields: dict[str, Any] = {
        "model_name": "Target-FastDraft-10M",
        "target_name": "org/Target",
        "target_revision": "abc123",
        "license": "apache-2.0",
        "draft_location": "/somewhere/run/draft",
        "num_assistant_tokens": 3,
        **given,
    }
    return render_card(summary, **fields)


def test_the_metadata_says_what_the_hub_wants_to_know(
    run_summary: RunSummary, tmp_path: Path
) -> None:
    render(run_summary).save(tmp_path / "README.md")
    card = ModelCard.load(tmp_path / "README.md")
    data = card.data
    assert data.base_model == "org/Target"
    assert data.license == "apache-2.0"
    assert data.library_name == "transformers"
    assert data.pipeline_tag == "text-generation"
    assert {"fastdraft", "speculative-decoding"} <= set(data.tags)
    assert data.model_name == "Target-FastDraft-10M"
    found = {(r.dataset_name, r.metric_type): r.metric_value for r in data.eval_results}
    assert found == {
        (task, metric): value
        for task in ("humaneval", "ifbench")
        # Of the two paths' speed-ups the last one; both are looked at below.
        for metric, value in (
            ("acceptance_rate", 0.4),
            ("block_efficiency", 2.2),
            ("speed_up", 1.5),
        )
    }
    assert {r.metric_name for r in data.eval_results} == {
        "Acceptance rate (γ = 3, T = 0.6; 95% 0.3 to 0.5)",
        "Block efficiency (γ = 3, T = 0.6; 95% 1.5 to 3)",
        "Speed-up (transformers, greedy, γ = 3; 95% 0.7 to 0.9)",
        "Speed-up (openvino, greedy, γ = 3; 95% 1.4 to 1.6)",
    }
    assert {r.dataset_type for r in data.eval_results} == {
        "openai/openai_humaneval",
        "allenai/IFBench_test",
    }
    assert data.eval_results[0].metric_args == {"confidence_level": 0.95, "low": 0.3, "high": 0.5}
    check_metadata(data.to_dict())


def test_every_sampled_setting_is_a_result(run_summary: RunSummary) -> None:
    evaluation = run_summary.evaluation
    assert evaluation is not None
    first, greedy = settings_of(evaluation)
    evaluation["settings"] = [first, {**first, "num_assistant_tokens": 5}, greedy]
    card = render(run_summary)
    names = {r.metric_name.split(";")[0] for r in card.data.eval_results}
    assert {name for name in names if "Speed" not in name} == {
        f"{metric} (γ = {gamma}, T = 0.6"
        for metric in ("Acceptance rate", "Block efficiency")
        for gamma in (3, 5)
    }
    assert "3 or 5 tokens drafted a round" in card.text
    again = yaml.safe_load(card.data.to_yaml())
    assert ModelCardData(**again).to_dict() == card.data.to_dict()


def test_a_task_that_training_read_is_told_on_the_card(run_summary: RunSummary) -> None:
    assert run_summary.evaluation is not None
    assert "did not leave out" not in render(run_summary).text
    run_summary.evaluation["not_held_out"] = ["ifbench"]
    assert "Training did not leave out the text of ifbench" in render(run_summary).text


def test_the_metadata_survives_a_round_trip(run_summary: RunSummary) -> None:
    card = render(run_summary)
    block = yaml.safe_load(card.data.to_yaml())
    assert list(block["model-index"][0]) == ["name", "results"]
    again = ModelCardData(**yaml.safe_load(card.data.to_yaml()))
    assert again.to_dict() == card.data.to_dict()


def test_the_text_is_filled_and_says_the_figures(run_summary: RunSummary) -> None:
    text = render(run_summary).text
    assert not re.search(r"\{\{|\}\}|\{%|%\}|\bNone\b|Undefined", text)
    assert text.lstrip().startswith("# Target-FastDraft-10M")
    for words in (
        "[org/Target](https://huggingface.co/org/Target) (abc123)",
        "10,000,000 parameters against the target's 100,000,000 (1/10.0)",
        "4 of 4 prompts",
        "on Some CPU, 2 cores:",
        "1.50x (1.40 to 1.60) at γ = 3: a speed-up",
        "no speed-up: the draft costs more time than it saves",
        "| humaneval | T = 0.6 | 3 | 2 | 0.400 (0.300 to 0.500)",
        "| align | chat: text the target wrote itself | 9 answers | the target's (apache-2.0) |",
        "| align | Python standard library (PSF-2.0) | 3 documents | PSF-2.0 |",
        "Objective of the alignment: 1 ce.",
        "Wall time 2.06 hours in all. Energy was not measured.",
        "The draft read 400,000 tokens in training.",
        "`num_assistant_tokens` is set to 3",
        "3 tokens drafted a round",
    ):
        assert words in text, words


def test_the_snippet_is_python_that_loads_both(run_summary: RunSummary) -> None:
    text = render(run_summary, draft_location="runs/x/draft").text
    snippet, ours = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    compile(snippet + ours, "card", "exec")
    assert 'draft = AutoModelForCausalLM.from_pretrained("runs/x/draft")' in snippet
    assert 'target = AutoModelForCausalLM.from_pretrained("org/Target")' in snippet
    assert "assistant_model=draft" in snippet
    assert "fastdraft_hf" not in snippet


def test_no_path_of_the_machine_but_the_drafts_own(run_summary: RunSummary) -> None:
    place = "/somewhere/run/draft"
    card = str(render(run_summary, draft_location=place))
    assert card.count(place) == 3  # transformers, vLLM, SGLang
    assert not re.findall(r"[\"'( ](?:/(?:root|home|work|tmp|usr)/|~/)\S*", card.replace(place, ""))
    assert str(Path.home()) not in card


def test_a_target_of_unknown_origin(run_summary: RunSummary) -> None:
    card = render(run_summary, target_name="folder", target_revision=None, license=None)
    assert card.data.license is None
    assert "Follows the target's license." in card.text
    assert "A draft model for folder:\n" in card.text  # no link to a page that is not there


def test_a_license_of_its_own_is_not_called_the_targets(run_summary: RunSummary) -> None:
    """`card.license` of a recipe overrules the target's; the text must not say otherwise."""
    text = render(run_summary, license="cc-by-4.0").text
    assert "cc-by-4.0" in text
    assert "cc-by-4.0 (the target's)" not in text


def test_an_unmeasured_draft_gets_no_card(run_summary: RunSummary) -> None:
    run_summary.evaluation = None
    with pytest.raises(ValueError, match="needs the results of stage evaluate"):
        render(run_summary)


def test_without_a_bench_the_card_says_so(run_summary: RunSummary) -> None:
    run_summary.bench = None
    text = render(run_summary).text
    assert "Wall clock was not measured." in text
    assert not re.search(r"\{\{|\bNone\b", text)


def test_a_judged_ratio_is_explained(run_summary: RunSummary) -> None:
    assert run_summary.bench is not None
    assert SPEED_NOTE not in render(run_summary).text
    judged = {"ratio": [1.2, 1.1, 1.3], "judged_on": "other half of the prompts", "pairs": 8}
    run_summary.bench["paths"]["openvino"]["overall"]["judged"] = judged
    run_summary.bench["best"] = {
        "path": "openvino",
        "draft": "",
        "num_assistant_tokens": 3,
        "tokens_per_second": 15.0,
        "judged": judged,
        "is_speed_up": True,
        "fastest_alone": {"engine": "openvino-alone", "tokens_per_second": 10.0},
    }
    text = render(run_summary).text
    assert SPEED_NOTE in text
    assert "The fastest setting is openvino with γ = 3: 15.0 tokens/s" in text
    assert "| 1.20 (1.10 to 1.30) | 3 |" in text


def test_the_best_setting_is_transformers_own(run_summary: RunSummary) -> None:
    assert run_summary.bench is not None
    paths = run_summary.bench["paths"]
    paths["transformers"]["overall"]["best_num_assistant_tokens"] = 5
    assert best_num_assistant_tokens(run_summary, default=2) == 5
    del paths["transformers"]
    assert best_num_assistant_tokens(run_summary, default=2) == 2
    run_summary.bench = None
    assert best_num_assistant_tokens(run_summary, default=2) == 2


def test_the_template_is_where_it_is_looked_for() -> None:
    text = template_path().read_text(encoding="utf-8")
    assert text.startswith("---\n{{ card_data }}\n---\n")


def test_energy_is_told_when_every_stage_measured_it(run_summary: RunSummary) -> None:
    records = list(run_summary.provenance.values())
    for record in records[1:]:
        record["energy_joules"] = 3.6e6
    assert "Energy was not measured." in render(run_summary).text
    records[0] |= {"energy_joules": 3.6e6, "energy_joules_of": {"cpu": 1.2e6, "gpu": 2.4e6}}
    said = f"Energy {len(records)} kWh (CPUs and GPUs, by their own counters)."
    assert said in render(run_summary).text


def test_energy_that_is_known_in_part_says_of_what(run_summary: RunSummary) -> None:
    records = list(run_summary.provenance.values())
    for record in records:
        record["energy_joules_of"] = {"gpu": 1.8e6}
    said = f"Energy of the GPUs alone {len(records) / 2:.3g} kWh; the rest is not known."
    assert said in render(run_summary).text
    del records[-1]["energy_joules_of"]["gpu"]
    assert "Energy was not measured." in render(run_summary).text


def test_a_license_that_is_not_on_the_hubs_list(run_summary: RunSummary) -> None:
    data = render(run_summary, license="other").data
    assert data.license_name == "target-license"
    assert data.license_link == "https://huggingface.co/org/Target"
    with pytest.raises(FastDraftError, match=r"no license 'apache-2' .did you mean 'apache-2\.0'"):
        render(run_summary, license="apache-2")


def test_a_folder_is_no_base_model(run_summary: RunSummary) -> None:
    assert render(run_summary, target_name="folder").data.base_model is None
    card = render(run_summary, target_name="folder", base_model="org/Real")
    assert card.data.base_model == "org/Real"
    assert 'AutoModelForCausalLM.from_pretrained("org/Real")' in card.text


def test_the_openvino_snippets(run_summary: RunSummary) -> None:
    assert "openvino_genai" not in render(run_summary).text
    for copy, wanted in (
        (OpenVINOCopy("openvino-int8", "/x/export/openvino-int8"), '"/x/export/openvino-int8"'),
        (OpenVINOCopy("openvino-int8"), 'subfolder="openvino-int8"'),
    ):
        text = render(run_summary, openvino=copy).text
        assert wanted in text
        for snippet in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL):
            compile(snippet, "card", "exec")


def test_a_path_of_the_users_own_data_stays_off_the_card(run_summary: RunSummary) -> None:
    sources = run_summary.provenance["align"]["facts"]["data"]["sources"]
    sources["/home/me/secret/tickets.jsonl"] = {"documents": 5}
    sources["org/corpus"] = {"documents": 6, "license": "odc-by"}
    text = render(run_summary).text
    assert "/home/me" not in text
    assert "| align | tickets.jsonl | 5 documents | see its source |" in text
    assert "| align | org/corpus | 6 documents | odc-by |" in text


def test_the_report_shows_the_card_as_a_page(run_summary: RunSummary) -> None:
    card = render(run_summary)
    page = card_preview(f"{card}\n<script>alert(1)</script>\n![x](https://some.where/x.png)\n")
    assert "<h1>Target-FastDraft-10M</h1>" in page
    assert page.count("<table>") == 4
    assert '<pre><code class="language-python">' in page
    assert "library_name" not in page  # metadata
    assert "untried" not in page  # comments
    assert "<script" not in page
    assert "<img" not in page
