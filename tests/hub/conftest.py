import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import transformers.utils.hub
import yaml
from hub_server import TOKEN, HubServer, hub_server
from huggingface_hub import constants
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from fastdraft_hf.eval.summary import RunSummary
from fastdraft_hf.hub.folder import write_custom_generate

SYNTHETIC = Path(__file__).parents[1] / "synthetic_run.json"


@pytest.fixture
def run_summary() -> RunSummary:
    """A finished run on two task sets; OpenVINO is a speed-up, transformers is none."""
    return RunSummary(**json.loads(SYNTHETIC.read_text(encoding="utf-8")))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    """A Hub on loopback that the client of this process talks to, logged in."""
    huggingface_hub.utils.disable_progress_bars()
    with hub_server() as server:
        point_client(monkeypatch, server, tmp_path / "hf_home")
        yield server
    huggingface_hub.utils.enable_progress_bars()
    huggingface_hub.close_session()


def point_client(monkeypatch: pytest.MonkeyPatch, server: HubServer, home: Path) -> None:
    """Point the client at a server. It reads its environment when it is imported, once."""
    huggingface_hub.close_session()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", server.url)
    # Newer versions of transformers keep a client of their own.
    monkeypatch.setattr(transformers.utils.hub, "_hf_api", None, raising=False)
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # between the client's retries


@pytest.fixture(scope="session")
def finished_run(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_model: Callable[..., LlamaForCausalLM],
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> Path:
    """A run's folder with a real tiny draft and records. Copy it to change it."""
    run = tmp_path_factory.mktemp("hub") / "run"
    summary = json.loads(SYNTHETIC.read_text(encoding="utf-8"))
    for stage, record in summary["provenance"].items():
        record |= {
            "target": "org/Target",
            "target_revision": "abc123",
            "command": f"fastdraft run /home/somebody/recipes/r.yaml output_dir={run}",
        }
        write(run / stage / "provenance.json", record)
    write(run / "evaluate" / "results.json", summary["evaluation"])
    write(run / "bench" / "results.json", summary["bench"])
    recipe = {"target": "org/Target", "card": {"license": "apache-2.0"}}
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    make_draft(run / "draft", tiny_model, tiny_tokenizer)
    facts = {"model_name": "Target-FastDraft", "num_assistant_tokens": 3, "license": "apache-2.0"}
    write(run / "draft" / "provenance.json", {**record, "stage": "card", "facts": facts})
    return run


def write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def make_draft(
    folder: Path, tiny_model: Callable[..., LlamaForCausalLM], tokenizer: PreTrainedTokenizerFast
) -> None:
    draft = tiny_model(seed=1)
    draft.generation_config.num_assistant_tokens = 3
    draft.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_custom_generate(folder)


@pytest.fixture
def run_folder(finished_run: Path, tmp_path: Path) -> Path:
    """A copy of the finished run."""
    return Path(shutil.copytree(finished_run, tmp_path / "run"))


@pytest.fixture
def fastdraft(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Run the command in this process; return its exit status and all that it printed."""
    from fastdraft_hf.cli.main import main

    def call(*words: str) -> tuple[int, str]:
        status = main([str(word) for word in words])
        said = capsys.readouterr()
        return status, said.out + said.err

    return call
