"""A planted token is nowhere in what is printed or written, wherever a user put it."""

import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hub_server import TOKEN, HubServer, gathered

from fastdraft_hf import FastDraftError
from fastdraft_hf.cli.main import main
from fastdraft_hf.hub.push import push

Command = Callable[..., tuple[int, str]]
# The shortest piece of it that would be worth something.
PIECE = TOKEN[3:15]


def holding(folders: Iterable[Path]) -> list[Path]:
    """Return the files, hidden ones too, that hold a piece of the token, or are named after it."""
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    assert files  # else nothing was looked at
    return [p for p in files if PIECE in str(p) or PIECE.encode() in p.read_bytes()]


def tiny_recipe(target: Path, output_dir: Path) -> dict[str, Any]:
    stage = {"max_train_tokens": 256, "max_length": 32, "per_device_train_batch_size": 2}
    stage |= {"sources": [{"kind": "generated", "name": "chat"}], "eval_rows": 1}
    few = {"prompts_per_task": 1, "max_new_tokens": 4, "max_prompt_tokens": 120, "tasks": ["mine"]}
    return {
        "target": str(target),
        "output_dir": str(output_dir),
        "device": "cpu",
        "design": {"hidden_size": 16, "num_hidden_layers": 1, "init": "scratch"},
        "generate": {
            "engine": "transformers",
            "sets": {"chat": {"kind": "free", "rows": 16, "max_new_tokens": 16}},
        },
        "pretrain": stage,
        "export": {"openvino": []},
        "evaluate": {**few, "untrained_prompts_per_task": 1},
        "bench": {**few, "paths": ["ours"], "num_assistant_tokens": [1]},
        "card": {"license": "mit", "base_model": "org/Target", "language": ["en"]},
    }


def test_a_whole_run_and_its_push(
    tiny_target_folder: Path,
    hub: HubServer,
    tmp_path: Path,
    fastdraft: Command,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Environment, token file and command line hold it; stdout, stderr, logs and files do not."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.jsonl").write_text('{"prompt": "the cat"}\n{"prompt": "the hat"}\n')
    recipe = tiny_recipe(tiny_target_folder, tmp_path / "run")
    for section in ("evaluate", "bench"):
        recipe[section]["tasks"] = {"mine": {"dataset": "mine.jsonl", "column": "prompt"}}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    # What `describe` records is the process's own command line.
    monkeypatch.setattr(sys, "argv", ["fastdraft", "run", "r.yaml", f"hub_token={TOKEN}", TOKEN])
    said = ""
    for words in (
        ["run", "r.yaml"],
        ["push", "run", "--repo-id", "user/d"],
        ["pull", "user/d", "pulled"],
    ):
        status, output = fastdraft(*words)
        assert status == 0, output
        said += output
    assert PIECE not in said
    assert (tmp_path / "run" / "draft" / "README.md").is_file()
    assert "[redacted]" in (tmp_path / "run" / "pretrain" / "provenance.json").read_text()
    assert holding([tmp_path / "run", tmp_path / "pulled"]) == []
    sent = hub.models["user/d"].history()
    names = [n for c in sent for n, e in c.files.items() if PIECE.encode() in e.content]
    assert names == []


@pytest.mark.parametrize(
    ("section", "value"),
    [
        ("pretrain.hub_token", TOKEN),
        ("pretrain.hub_token", "not-even-shaped-like-one"),
        ("pretrain.push_to_hub_token", "x"),
        ("pretrain.run_name", f"with {TOKEN}"),
        ("target", f"https://user:{TOKEN}@huggingface.co/org/Target"),
        ("card.model_name", TOKEN),
        ("pretrain.sources.0.name", TOKEN),
        ("pretrain.max_train_tokens", TOKEN),
        ("generate.server", "http://user:sesame-1@127.0.0.1:9/v1"),
        ("generate.server", "http://user:ses@me/1@127.0.0.1:9/v1"),
        ("generate.server", "http://127.0.0.1:9/v1?api_key=sesame-1"),
        ("pretrain.sources.0.name", "https://host/data.jsonl?a=b&X-Access-Token=sesame-1"),
        ("target", "https://sesame-1@host/model"),
        ("target_revision", "hf_oauth_eyJ.se-same_1"),
        ("card.model_name", "hf_jwt_eyJhbGci.se-same_1"),
        ("output_dir", "api_org_" + "sesame" * 5),
        ("pretrain.run_name", "a Bearer sesame.1.2.3"),
        ("pretrain.run_name", 'x{"token":"open-sesame"}'),
        ("pretrain.lr_scheduler_kwargs.api_key", "sesame"),
        ("generate.sets.chat.dataset", "sk-proj-sesame-1234567890"),
    ],
)
@pytest.mark.parametrize("by", ["file", "override"])
def test_a_recipe_with_a_token_is_refused_and_written_nowhere(
    section: str, value: str, by: str, tmp_path: Path, fastdraft: Command
) -> None:
    recipe = tiny_recipe(tmp_path / "target", tmp_path / "run")
    words = [f"{section}={value}"]
    if by == "file":
        recipe = build_and_dump(recipe, section, value)
        words = []
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    status, said = fastdraft("run", tmp_path / "r.yaml", *words)
    assert status == 2
    assert f"{section}: a token or password does not belong in a recipe" in said
    assert ("VLLM_API_KEY" if section == "generate.server" else "HF_TOKEN") in said
    assert len(said.strip().splitlines()) == 1
    assert value not in said
    assert "same" not in said
    assert [path.name for path in tmp_path.iterdir()] == ["r.yaml"]


def build_and_dump(recipe: dict[str, Any], path: str, value: str) -> dict[str, Any]:
    *parents, last = path.split(".")
    place: Any = recipe
    for key in parents:
        place = place[int(key)] if isinstance(place, list) else place.setdefault(key, {})
    place[last] = value
    return recipe


@pytest.mark.parametrize(
    "words",
    [
        ["run", "r.yaml", "--token", TOKEN],
        ["run", "r.yaml", f"--token={TOKEN}"],
        ["run", "r.yaml", TOKEN],
        ["run", TOKEN],
        ["run", "broken.yaml"],
        ["run", "seed.yaml"],
        ["run", "text.yaml"],
        ["run", "r.yaml", f"seed={{{TOKEN}"],
        ["push", TOKEN, "--repo-id", "user/d"],
        ["push", "nothing", "--repo-id", TOKEN],
        ["pull", f"user/{TOKEN}/x", "place"],
        ["plan", "r.yaml", "--hardware", TOKEN],
    ],
)
def test_words_in_the_wrong_place(
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("r.yaml").write_text("seed: 0\n", encoding="utf-8")
    for name, text in (("broken", f"seed: {{{TOKEN}"), ("seed", f"seed: {TOKEN}"), ("text", TOKEN)):
        Path(f"{name}.yaml").write_text(text, encoding="utf-8")
    try:
        status = main(words)
    except SystemExit as stop:
        status = int(stop.code or 0)
    said = capsys.readouterr()
    assert status == 2
    assert PIECE not in said.out + said.err


def test_an_error_of_the_hub_that_quotes_the_request(
    run_folder: Path, hub: HubServer, caplog: pytest.LogCaptureFixture
) -> None:
    """At every request of a push; also where the line is cut in the middle of the token."""
    files = gathered(run_folder, "user/d")
    refused = 0
    for number in range(8):
        hub.models.clear()
        hub.break_at("echo", number, 100)
        try:
            push(files, "user/d")
        except FastDraftError as error:
            refused += 1
            chain: BaseException | None = error
            while chain is not None:
                assert PIECE not in str(chain)
                # What a traceback would print besides: nothing, for the cause is suppressed.
                assert chain.__cause__ is None
                assert chain.__suppress_context__
                chain = chain.__cause__
        hub.heal()
    assert refused > 4
    assert PIECE not in caplog.text


def test_a_secret_that_looks_like_nothing(
    run_folder: Path, hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Known only because it is the environment's own; it stands across the end of the line."""
    secret = "plain-words-of-a-proxy-" * 3
    monkeypatch.setenv("HF_TOKEN", secret)
    hub.break_at("echo", 0, 100)
    with pytest.raises(FastDraftError) as caught:
        push(gathered(run_folder, "user/d"), "user/d")
    assert "[redacted]" in str(caught.value)
    assert "plain-words" not in str(caught.value)
