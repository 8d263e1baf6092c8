"""The drafts that lie in the repository, used as anybody would: with nothing of ours."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fastdraft_hf.cli.demo import SHIPPED

# The draft that users get, and the pre-trained one that quickstart starts from.
NAMES = (SHIPPED, f"{SHIPPED}-Base")
CARDS = Path(__file__).resolve().parents[1] / "model_cards"
MEGABYTES = 25


@pytest.fixture(params=NAMES)
def folder(request: pytest.FixtureRequest) -> Path:
    return CARDS / str(request.param)


# Plain transformers in a process of its own; the package is not even in reach of an import.
USE = """
import json, sys
sys.modules["fastdraft_hf"] = None
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
torch.set_num_threads(1)
target_folder, *draft_folders = sys.argv[1:]
target = AutoModelForCausalLM.from_pretrained(target_folder, dtype=torch.float32)
vocabulary = AutoTokenizer.from_pretrained(target_folder).get_vocab()
chat = [{"role": "user", "content": "What is a river delta?"}]
found = []
for draft_folder in draft_folders:
    draft = AutoModelForCausalLM.from_pretrained(draft_folder)
    tokenizer = AutoTokenizer.from_pretrained(draft_folder)
    assert tokenizer.get_vocab() == vocabulary
    texts = []
    for prompt in (
        "class Queue:",
        tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True),
    ):
        inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
        given = {**inputs, "do_sample": False, "max_new_tokens": 24}
        alone = target.generate(**given)[0].tolist()
        texts.append([alone, target.generate(**given, assistant_model=draft)[0].tolist()])
    found.append({
        "dtype": str(draft.dtype),
        "parameters": draft.num_parameters(),
        "of_target": target.num_parameters(),
        "gamma": draft.generation_config.num_assistant_tokens,
        "schedule": draft.generation_config.num_assistant_tokens_schedule,
        "threshold": draft.generation_config.assistant_confidence_threshold,
        "texts": texts,
    })
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def used(target_folder: Path) -> dict[str, Any]:
    """What plain transformers found of each draft."""
    folders = [str(CARDS / name) for name in NAMES]
    done = subprocess.run(
        [sys.executable, "-c", USE, str(target_folder), *folders], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(zip(NAMES, json.loads(done.stdout), strict=True))


def test_plain_transformers_uses_it_as_it_lies(used: dict[str, Any], folder: Path) -> None:
    found = used[folder.name]
    assert found["dtype"] == "torch.bfloat16"
    assert found["parameters"] <= found["of_target"] / 10
    assert 1 <= found["gamma"] <= 20
    assert found["schedule"] == "constant"
    assert found["threshold"] == 0.0
    for alone, assisted in found["texts"]:
        assert assisted == alone
        assert len(alone) > 3


def test_its_weights_are_small_and_no_pickle_is_there(folder: Path) -> None:
    from safetensors import safe_open

    weights = list(folder.glob("*.safetensors"))
    assert sum(f.stat().st_size for f in weights) <= MEGABYTES * 1e6
    for file in weights:
        with safe_open(file, "pt") as stream:
            types = {stream.get_slice(name).get_dtype() for name in stream.keys()}  # noqa: SIM118
        assert types == {"BF16"}
    names = [f.name for f in folder.rglob("*") if f.is_file()]
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pkl", ".pickle"))]


def test_its_card_obeys_the_hub_and_names_the_target(folder: Path) -> None:
    from huggingface_hub import ModelCard

    card = ModelCard.load(folder / "README.md")
    data = card.data.to_dict()
    assert data["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert data["license"] == "apache-2.0"
    assert "## Measured" in card.text
    assert f'from_pretrained("model_cards/{folder.name}")' in card.text
    assert ("It is not aligned" in card.text) == folder.name.endswith("-Base")


def test_its_record_says_how_it_was_made(folder: Path) -> None:
    records = json.loads((folder / "provenance.json").read_text(encoding="utf-8"))
    measured = records["evaluate"]["facts"]
    assert measured["greedy_identical"] == measured["greedy_prompts"] > 0
    trained = "continue" if folder.name.endswith("-Base") else "align"
    assert {"design", trained, "evaluate", "bench", "card"} <= records.keys()
