"""A draft of the real target: trained, exported, pushed, pulled and used, as a user would do it."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hub_server import TOKEN, HubServer, client_environment, hub_server
from huggingface_hub import ModelCard

from fastdraft_hf.export.openvino import openvino_available

REPO = "user/SmolLM2-135M-draft"
TARGET = "HuggingFaceTB/SmolLM2-135M-Instruct"

RECIPE: dict[str, Any] = {
    "target": "embedded:smollm2-135m-instruct",
    "device": "cpu",
    "design": {"params": "6M", "num_hidden_layers": 1, "init": "project"},
    "generate": {
        "sets": {"text": {"kind": "free", "rows": 8, "max_new_tokens": 24, "temperatures": [1.0]}}
    },
    "pretrain": {
        "sources": [{"kind": "python"}, {"kind": "generated", "name": "text"}],
        "max_train_tokens": 768,
        "max_length": 64,
        "per_device_train_batch_size": 2,
        "eval_rows": 2,
    },
    "export": {"openvino": ["fp32", "int8"]},
    "evaluate": {
        "prompts_per_task": 2,
        "max_new_tokens": 8,
        "max_prompt_tokens": 120,
        "untrained_prompts_per_task": 1,
    },
    "bench": {
        "paths": ["transformers", "openvino"],
        "prompts_per_task": 2,
        "max_new_tokens": 8,
        "max_prompt_tokens": 120,
        "num_assistant_tokens": [2],
    },
    "card": {"language": ["en", "code"]},
}

# Greedy text through both engines, from a folder or a repository.
TEXTS = """
import sys, json, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from optimum.intel import OVModelForCausalLM
target_folder, draft, openvino = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(draft)
inputs = tokenizer("def fibonacci(n):", return_tensors="pt")
given = {**inputs, "do_sample": False, "max_new_tokens": 16}
model = AutoModelForCausalLM.from_pretrained(draft, dtype=torch.float32)
texts = [model.generate(**given)[0].tolist()]
target = AutoModelForCausalLM.from_pretrained(target_folder, dtype=torch.float32)
alone = target.generate(**given)[0].tolist()
texts.append(target.generate(**given, assistant_model=model)[0].tolist())
assert texts[-1] == alone
# OpenVINO would round to bfloat16 where the processor has it.
exact = {"INFERENCE_PRECISION_HINT": "f32"}
for name in ("openvino-fp32", "openvino-int8"):
    if openvino == "repository":
        exported = OVModelForCausalLM.from_pretrained(draft, subfolder=name, ov_config=exact)
    else:
        exported = OVModelForCausalLM.from_pretrained(f"{openvino}/{name}", ov_config=exact)
    texts.append(exported.generate(**given)[0].tolist())
assert texts[0] == texts[2], "fp32 is the same model"
print(json.dumps(texts))
"""


def run(words: list[str], environment: dict[str, str], folder: Path) -> str:
    done = subprocess.run(words, env=environment, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    assert TOKEN not in done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.skipif(not openvino_available(), reason="the openvino extra is not installed")
def test_trained_exported_pushed_pulled_and_used(tmp_path: Path, target_folder: Path) -> None:
    from fastdraft_hf.export.openvino import cached_openvino

    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE), encoding="utf-8")
    fastdraft = [sys.executable, "-m", "fastdraft_hf.cli.main"]
    with hub_server() as hub:
        offline = client_environment(hub, tmp_path / "home", HF_HUB_OFFLINE="1")
        run([*fastdraft, "run", "recipe.yaml", "output_dir=run"], offline, tmp_path)
        online = client_environment(hub, tmp_path / "home")
        run([*fastdraft, "push", "run", "--repo-id", REPO, "--openvino"], online, tmp_path)
        check_repository(hub, tmp_path / "run")

        # Another machine: its own cache, and nothing of the run.
        other = client_environment(hub, tmp_path / "other")
        run([*fastdraft, "pull", REPO, "pulled"], other, tmp_path)
        use = [sys.executable, "-c", TEXTS, str(target_folder)]
        here = run([*use, "run/draft", "run/export"], offline, tmp_path)
        assert run([*use, "pulled", "pulled"], other, tmp_path) == here
        assert run([*use, REPO, "repository"], other, tmp_path) == here

        # The snippets of the card as it stands on the Hub, in the order in which they stand.
        card = hub.models[REPO].history()[0].files["README.md"].content.decode()
        snippets = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
        assert len(snippets) == 4
        script = "\n".join(snippets).replace(f'"{TARGET}"', f'"{target_folder}"')
        script = script.replace('"target-int8"', f'"{cached_openvino(target_folder, "int8")}"')
        said = run([sys.executable, "-c", script], other, tmp_path)
        assert said.count("fibonacci") >= 3  # GenAI prints the continuation only


def check_repository(hub: HubServer, folder: Path) -> None:
    repo = hub.models[REPO]
    assert len(repo.history()) == 2
    files = repo.history()[0].files
    for exported in ("fp32", "int8"):
        name = f"openvino-{exported}/openvino_model.bin"
        assert files[name].content == (folder / "export" / name).read_bytes()

    card = ModelCard(files["README.md"].content.decode())
    data = card.data
    assert data.base_model == TARGET
    assert data.license == "apache-2.0"
    assert data.language == ["en", "code"]
    evaluation = json.loads((folder / "evaluate" / "results.json").read_text(encoding="utf-8"))
    figures = evaluation["tasks"]["humaneval"]["sampled"]
    shown = {(r.dataset_name, r.metric_type): r.metric_value for r in reversed(data.eval_results)}
    for key in ("acceptance_rate", "block_efficiency"):
        assert shown["humaneval", key] == pytest.approx(figures[key][0], abs=1e-4)
    assert {r.metric_name.split(",")[0] for r in data.eval_results if "Speed" in r.metric_name} == {
        "Speed-up (transformers",
        "Speed-up (openvino",
    }
