"""`fastdraft push` and `pull` through the real client, over HTTP, with every request broken."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hub_server import (
    ATTRIBUTES,
    READ_TOKEN,
    TOKEN,
    Entry,
    HubServer,
    Repo,
    client_environment,
    hub_server,
)

from fastdraft_hf._errors import FastDraftError
from fastdraft_hf.hub import errors
from fastdraft_hf.hub.pull import pull_draft
from fastdraft_hf.hub.push import plan_push, push

Command = Callable[..., tuple[int, str]]
REPO, DATA = "user/draft", "user/data"


def send(folder: Path, **given: Any) -> list[str]:
    options = {k: given.pop(k) for k in ("dataset", "openvino") if k in given}
    return push(plan_push(folder, REPO, **options), **given)


def same_files(one: Path, other: Path) -> None:
    names = {p.relative_to(one).as_posix() for p in one.rglob("*") if p.is_file()}
    for name in names - {"README.md", "provenance.json"}:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


def test_up_and_down_again(run_folder: Path, hub: HubServer, fastdraft: Command) -> None:
    status, said = fastdraft("push", run_folder, "--repo", REPO, "--dataset", DATA)
    assert status == 0, said
    assert f"{hub.url}/{REPO}" in said
    assert f"{hub.url}/datasets/{DATA}" in said
    assert TOKEN not in said
    for repo in (hub.models[REPO], hub.datasets[DATA]):
        assert [c.title for c in repo.history()] == [
            "Draft made with fastdraft_hf",
            "initial commit",
        ]
        assert not repo.private
    files = hub.models[REPO].history()[0].files
    assert {
        "model.safetensors",
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "README.md",
        "provenance.json",
        "custom_generate/generate.py",
        "custom_generate/requirements.txt",
    } <= set(files)
    assert not [name for name in files if name.endswith((".bin", ".pt", ".pkl", ".yaml"))]
    assert files["model.safetensors"].lfs is not None

    place = run_folder.parent / "pulled"
    status, said = fastdraft("pull", REPO, place)
    assert status == 0, said
    assert said.startswith(f"{place}\n")
    same_files(run_folder / "draft", place)


def test_the_card_on_the_hub_names_the_repository(run_folder: Path, hub: HubServer) -> None:
    send(run_folder, dataset=DATA)
    files = hub.models[REPO].history()[0].files
    card = files["README.md"].content.decode()
    assert f'AutoModelForCausalLM.from_pretrained("{REPO}")' in card
    assert str(run_folder) not in card
    assert f"- {DATA}" in card.split("---")[1]  # the metadata
    record = files["provenance.json"].content.decode()
    assert {"design", "align", "card"} <= set(json.loads(record))
    assert "/home/somebody" not in record
    assert str(run_folder.parent) not in record
    assert "fastdraft run r.yaml" in record
    data = hub.datasets[DATA].history()[0].files
    assert set(data) == {
        ".gitattributes",
        "README.md",
        "chat/manifest.json",
        "chat/part-00000.parquet",
        "chat/part-00001.parquet",
    }
    assert b"config_name: chat" in data["README.md"].content
    assert b"[org/Target](https://huggingface.co/org/Target)" in data["README.md"].content


def test_the_sets_own_card_is_used(run_folder: Path, hub: HubServer) -> None:
    own = "---\nlicense: mit\n---\nWritten at T = 1.\n"
    (run_folder / "generate" / "chat" / "README.md").write_text(own, encoding="utf-8")
    send(run_folder, dataset=DATA)
    card = hub.datasets[DATA].history()[0].files["README.md"].content.decode()
    assert "Written at T = 1." in card
    assert "license: mit" not in card


def test_private_and_a_branch(run_folder: Path, hub: HubServer, fastdraft: Command) -> None:
    words = ("push", run_folder, "--repo", REPO, "--private", "--revision", "v2")
    assert fastdraft(*words)[0] == 0
    repo = hub.models[REPO]
    assert repo.private
    assert list(repo.at("main").files) == [".gitattributes"]
    assert "model.safetensors" in repo.at("v2").files
    place = pull_draft(REPO, run_folder.parent / "pulled", "v2")
    same_files(run_folder / "draft", place)
    with pytest.raises(FastDraftError, match="has no such revision"):
        pull_draft(REPO, run_folder.parent / "other", "v3")


def test_a_draft_that_stands_alone(run_folder: Path, hub: HubServer, tmp_path: Path) -> None:
    """Of a training stage, or made by hand: it gets the way to our loop as well."""
    alone = Path(shutil.copytree(run_folder / "draft", tmp_path / "alone"))
    shutil.rmtree(alone / "custom_generate")
    card = "---\nbase_model: org/Target\n---\n# Mine\n"
    (alone / "README.md").write_text(card, encoding="utf-8")
    push(plan_push(alone, REPO))
    files = hub.models[REPO].history()[0].files
    assert b"def generate" in files["custom_generate/generate.py"].content
    assert json.loads(files["provenance.json"].content)["draft"]["stage"] == "card"


def test_a_dry_run_asks_nothing(run_folder: Path, hub: HubServer, fastdraft: Command) -> None:
    status, said = fastdraft("push", run_folder, "--repo", REPO, "--dry-run")
    assert status == 0
    assert "model.safetensors" in said
    assert hub.log == []
    assert hub.models == {}


def test_nothing_new_is_no_commit(run_folder: Path, hub: HubServer) -> None:
    send(run_folder)
    before = hub.models[REPO].history()
    uploads = list(hub.uploaded)
    send(run_folder)
    assert hub.models[REPO].history() == before
    assert hub.uploaded == uploads


def test_another_draft_replaces_what_the_first_left(
    run_folder: Path, hub: HubServer, tiny_model: Any
) -> None:
    send(run_folder)
    repo = hub.models[REPO]
    kept = {**repo.history()[0].files, "picture.png": Entry(b"png")}
    kept["model-00001-of-00002.safetensors"] = Entry(b"old")
    kept["openvino-int8/openvino_model.bin"] = Entry(b"of the old weights")
    repo.add("main", "by hand", kept)
    tiny_model(seed=7).save_pretrained(run_folder / "draft")
    send(run_folder)
    files = repo.history()[0].files
    assert "picture.png" in files
    assert "model-00001-of-00002.safetensors" not in files
    assert "openvino-int8/openvino_model.bin" not in files
    assert len(repo.history()) == 4
    assert len(set(hub.uploaded)) == 2


# ------------------------------------------------------------------------------- names and tokens


def test_a_name_that_is_taken(run_folder: Path, hub: HubServer, fastdraft: Command) -> None:
    repo = hub.models[REPO] = Repo(private=False)
    theirs = {".gitattributes": Entry(ATTRIBUTES), "model.safetensors": Entry(b"theirs")}
    repo.add("main", "theirs", theirs)
    status, said = fastdraft("push", run_folder, "--repo", REPO)
    assert status == 2
    assert f"push: {REPO} exists and was not made by fastdraft_hf" in said
    assert len(repo.history()) == 1
    assert hub.uploaded == []
    assert fastdraft("push", run_folder, "--repo", REPO, "--overwrite")[0] == 0
    assert repo.history()[0].files["model.safetensors"].content != b"theirs"


def test_a_draft_of_another_target(run_folder: Path, hub: HubServer) -> None:
    send(run_folder)
    for record in run_folder.rglob("provenance.json"):
        text = record.read_text(encoding="utf-8").replace("org/Target", "org/Second")
        record.write_text(text, encoding="utf-8")
    with pytest.raises(FastDraftError, match="is a draft for org/Target, not for org/Second"):
        send(run_folder)
    assert len(hub.models[REPO].history()) == 2


def test_an_empty_repository_is_filled(run_folder: Path, hub: HubServer) -> None:
    hub.models[REPO] = Repo(private=True)
    hub.models[REPO].add("main", "initial commit", {".gitattributes": Entry(ATTRIBUTES)})
    send(run_folder)
    assert hub.models[REPO].private  # an old repository keeps its visibility
    assert len(hub.models[REPO].history()) == 2


def test_both_names_are_looked_at_before_anything_is_sent(run_folder: Path, hub: HubServer) -> None:
    hub.models[REPO] = Repo(private=False)
    hub.models[REPO].add("main", "theirs", {"README.md": Entry(b"theirs")})
    with pytest.raises(FastDraftError, match="was not made by fastdraft_hf"):
        send(run_folder, dataset=DATA)
    assert hub.datasets == {}


@pytest.mark.parametrize(
    ("token", "said"),
    [
        (None, "no token: run `hf auth login`, or set HF_TOKEN"),
        ("hf_" + "WrongTokenWrongToken", "the Hub refuses the token"),
        (READ_TOKEN, f"the token may not write to {REPO} \\(403\\)"),
    ],
)
def test_tokens(
    run_folder: Path,
    hub: HubServer,
    monkeypatch: pytest.MonkeyPatch,
    token: str | None,
    said: str,
) -> None:
    if token is None:
        monkeypatch.delenv("HF_TOKEN")
    else:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(FastDraftError, match=said) as caught:
        send(run_folder)
    assert token is None or token not in str(caught.value)
    assert "\n" not in str(caught.value)
    assert hub.models == {}
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    send(run_folder)


def test_somebody_elses_name(run_folder: Path, hub: HubServer) -> None:
    with pytest.raises(FastDraftError, match="may not write to other/draft"):
        push(plan_push(run_folder, "other/draft"))


@pytest.mark.parametrize("name", ["README.md", "config.json", "chat_template.jinja"])
def test_a_token_in_a_file_is_never_sent(run_folder: Path, hub: HubServer, name: str) -> None:
    path = run_folder / "draft" / name
    path.write_text(path.read_text(encoding="utf-8") if path.exists() else "---\n---\n# x\n")
    with path.open("a", encoding="utf-8") as stream:
        stream.write(f"\n{TOKEN}\n")
    if name == "README.md":
        metadata = "---\nbase_model: org/Target\n---\n"
        path.write_text(f"{metadata}{TOKEN}\n", encoding="utf-8")
    with pytest.raises(FastDraftError, match=f"{name} holds what looks like a token") as caught:
        send(run_folder)
    assert TOKEN not in str(caught.value)
    assert hub.log == []


def test_a_token_in_a_command_line_is_blotted_out(run_folder: Path, hub: HubServer) -> None:
    path = run_folder / "align" / "provenance.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**record, "command": f"fastdraft hub_token={TOKEN}"}))
    send(run_folder)
    sent = hub.models[REPO].history()[0].files
    assert not [name for name, entry in sent.items() if TOKEN.encode() in entry.content]
    assert b"hub_token=[redacted]" in sent["provenance.json"].content


# ---------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("repo", "given", "said"),
    [
        ("draft", {}, "--repo: give the owner as well, such as user/draft"),
        ("a b/c", {}, "--repo: 'a b/c' is no id of the Hub"),
        (REPO, {"dataset": "data"}, "--dataset: give the owner as well"),
        (REPO, {"openvino": True}, "--openvino: .* holds no OpenVINO folder"),
    ],
)
def test_bad_options(run_folder: Path, repo: str, given: dict[str, Any], said: str) -> None:
    with pytest.raises(FastDraftError, match=said):
        plan_push(run_folder, repo, **given)


def test_folders_that_are_no_draft(run_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FastDraftError, match="there is no folder"):
        plan_push(tmp_path / "none", REPO)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FastDraftError, match="neither a run's folder nor a draft's"):
        plan_push(tmp_path / "empty", REPO)
    (run_folder / "draft" / "model.safetensors").rename(run_folder / "draft" / "model.bin")
    with pytest.raises(FastDraftError, match=r"holds no \.safetensors weights"):
        plan_push(run_folder, REPO)
    shutil.rmtree(run_folder / "draft")
    with pytest.raises(FastDraftError, match="holds no finished draft yet"):
        plan_push(run_folder, REPO)
    shutil.rmtree(run_folder / "generate")
    with pytest.raises(FastDraftError, match="holds no finished draft yet"):
        plan_push(run_folder, REPO, dataset=DATA)


def test_a_card_that_somebody_wrote_on_is_kept(run_folder: Path, hub: HubServer) -> None:
    draft = run_folder / "draft"
    text = f'---\nbase_model: org/Target\n---\nMy words.\nfrom_pretrained("{draft}")\n'
    (draft / "README.md").write_text(text, encoding="utf-8")
    send(run_folder)
    card = hub.models[REPO].history()[0].files["README.md"].content.decode()
    assert "My words." in card
    assert f'from_pretrained("{REPO}")' in card
    assert "- fastdraft" in card  # so that the next push knows its own
    (draft / "README.md").write_text(text + "See /home/me/notes.txt\n", encoding="utf-8")
    with pytest.raises(FastDraftError, match=r"names a path of this machine, /home/me/notes\.txt"):
        send(run_folder)


@pytest.mark.parametrize(
    ("metadata", "said"),
    [
        ("license: apache2", "license: the Hub knows no license 'apache2' \\(did you mean"),
        ("tags: [a]", "base_model: the Hub must know whose draft this is"),
        ("base_model: a/b/c", "base_model: 'a/b/c' is no id of the Hub"),
    ],
)
def test_a_card_against_the_hubs_rules(
    run_folder: Path, hub: HubServer, metadata: str, said: str
) -> None:
    (run_folder / "draft" / "README.md").write_text(f"---\n{metadata}\n---\n# x\n")
    with pytest.raises(FastDraftError, match=said):
        send(run_folder)
    assert hub.log == []


# --------------------------------------------------------------------------------------- faults


def requests_of(call: Callable[[], Any], hub: HubServer) -> int:
    """Return how many requests a call makes."""
    before = len(hub.log)
    call()
    return len(hub.log) - before


def faults(*kinds: str) -> list[Any]:
    """Return each kind of fault, once and lasting; half of them are for the slow tests."""
    both = [(kind, times) for kind in kinds for times in (1, 100)]
    fast = {("lost", 1), ("truncated", 1), ("reset", 1), ("500", 100)}
    return [pytest.param(*f, marks=() if f in fast else pytest.mark.slow) for f in both]


def message_of(call: Callable[[], Any]) -> str:
    """Return the one line that a call ends with, "" when it succeeds."""
    try:
        call()
    except FastDraftError as error:
        said = str(error)
    else:
        return ""
    assert "\n" not in said
    assert TOKEN not in said
    return said


@pytest.mark.parametrize(("kind", "times"), faults("500", "reset", "lost", "truncated"))
def test_every_request_of_a_push_may_break(
    run_folder: Path, hub: HubServer, caplog: pytest.LogCaptureFixture, kind: str, times: int
) -> None:
    """Each ends in success or in one clear line; then the same call succeeds, nothing doubled."""
    hub.chunk_size = 20_000  # the weights go up in parts
    plans = plan_push(run_folder, REPO, dataset=DATA)
    total = requests_of(lambda: push(plans), hub)
    assert total > 20
    wanted = {kind: {n: r.history()[0].files for n, r in hub.repos(kind).items()} for kind in KINDS}
    refused = 0
    for number in range(total):
        hub.models.clear()
        hub.datasets.clear()
        hub.uploaded.clear()
        hub.break_at(kind, number, times)
        said = message_of(lambda: push(plans))
        if said:
            refused += 1
            assert said.startswith("push: ")
            assert len(said) < 400
            for repos in (hub.models, hub.datasets):  # all of it or nothing
                for repo in repos.values():
                    assert len(repo.history()) in (1, 2)
        hub.heal()
        push(plans)
        found = {k: {n: r.history()[0].files for n, r in hub.repos(k).items()} for k in KINDS}
        assert found == wanted, number
        for repos in (hub.models, hub.datasets):
            assert all(len(repo.history()) == 2 for repo in repos.values()), number
        if times == 1:  # a large file is sent once; where the storage's answer was lost, twice
            again = len(hub.uploaded) - len(set(hub.uploaded))
            assert again <= (0 if kind in ("500", "reset") else 1), number
    assert refused > 0 or times == 1
    assert TOKEN not in caplog.text


KINDS = ("models", "datasets")


def test_what_was_sent_is_not_sent_again(run_folder: Path, hub: HubServer) -> None:
    plans = plan_push(run_folder, REPO)
    push(plans)
    commit = next(n for n, (_, path) in enumerate(hub.log) if "/commit/" in path)
    hub.models.clear()
    hub.uploaded.clear()
    hub.break_at("reset", commit, times=100)
    with pytest.raises(FastDraftError, match="what was sent is not sent again"):
        push(plans)
    assert len(hub.uploaded) == 1
    assert len(hub.models[REPO].history()) == 1  # empty, and whole
    hub.heal()
    hub.log.clear()
    push(plans)
    assert len(hub.uploaded) == 1
    assert not [path for method, path in hub.log if method == "PUT"]


def test_a_server_that_says_nothing(
    run_folder: Path, hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(errors, "TIMEOUT_SECONDS", 0.2)
    plans = plan_push(run_folder, REPO)
    hub.break_at("silent", 0)
    with pytest.raises(FastDraftError, match="could not be reached or broke off"):
        push(plans)
    hub.heal()
    push(plans)


def test_no_server_at_all(run_folder: Path, hub: HubServer) -> None:
    plans = plan_push(run_folder, REPO)
    hub.server.server_close()
    hub.server.shutdown()
    with pytest.raises(FastDraftError, match="could not be reached or broke off"):
        push(plans)


@pytest.mark.parametrize(("kind", "times"), faults("500", "reset", "truncated"))
def test_every_request_of_a_pull_may_break(
    run_folder: Path, hub: HubServer, tmp_path: Path, kind: str, times: int
) -> None:
    send(run_folder)
    total = requests_of(lambda: pull_draft(REPO, tmp_path / "first"), hub)
    for number in range(total):
        place = tmp_path / f"{number}"
        hub.break_at(kind, number, times)
        said = message_of(lambda place=place: pull_draft(REPO, place))
        assert said == "" or said.startswith("pull: ")
        hub.heal()
        same_files(run_folder / "draft", pull_draft(REPO, place))


def test_a_damaged_file_is_noticed(run_folder: Path, hub: HubServer, tmp_path: Path) -> None:
    send(run_folder)
    place = pull_draft(REPO, tmp_path / "pulled")
    weights = place / "model.safetensors"
    good = weights.read_bytes()
    weights.write_bytes(good[:-1] + b"x")
    pull_draft(REPO, place)
    assert weights.read_bytes() == good
    entry = hub.models[REPO].history()[0].files["model.safetensors"]
    entry.content = good[:-1] + b"y"  # what the Hub sends is not what it says
    with pytest.raises(FastDraftError, match="is not what the Hub says it is"):
        pull_draft(REPO, tmp_path / "other")


def test_what_cannot_be_pulled(
    hub: HubServer, tmp_path: Path, run_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(FastDraftError, match="the Hub has no user/none"):
        pull_draft("user/none")
    with pytest.raises(FastDraftError, match="'a b' is no id of the Hub"):
        pull_draft("a b")
    hub.models["user/pickle"] = Repo(private=False)
    hub.models["user/pickle"].add("main", "x", {"pytorch_model.bin": Entry(b"pickle")})
    with pytest.raises(FastDraftError, match=r"holds no \.safetensors weights"):
        pull_draft("user/pickle")
    send(run_folder)
    with pytest.raises(FastDraftError, match="holds a model already"):
        pull_draft(REPO, run_folder / "draft")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FastDraftError, match="HF_HUB_OFFLINE is set"):
        pull_draft(REPO)


# ------------------------------------------------------------------------- processes of their own

LOAD = """
import sys
from pathlib import Path
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

repo, folder = sys.argv[1:]
ours = AutoModelForCausalLM.from_pretrained(repo)
local = AutoModelForCausalLM.from_pretrained(folder)
state = local.state_dict()
assert state.keys() == ours.state_dict().keys()
assert all(torch.equal(state[name], value) for name, value in ours.state_dict().items())
assert ours.generation_config.num_assistant_tokens == 3
assert AutoTokenizer.from_pretrained(repo)("the cat").input_ids
assert not [name for name in sys.modules if name.startswith("fastdraft_hf")]
print("same")
"""


def test_the_command_and_plain_from_pretrained(run_folder: Path, tmp_path: Path) -> None:
    """As a user has it: a process for the push, another one that knows nothing of ours."""
    with hub_server() as server:
        words = [sys.executable, "-m", "fastdraft_hf.cli.main", "push", str(run_folder)]
        sent = subprocess.run(
            [*words, "--repo", REPO],
            env=client_environment(server, tmp_path / "one"),
            capture_output=True,
            text=True,
        )
        assert sent.returncode == 0, sent.stderr
        assert sent.stdout == f"{server.url}/{REPO}\n"
        assert TOKEN not in sent.stdout + sent.stderr
        used = subprocess.run(
            [sys.executable, "-c", LOAD, REPO, str(run_folder / "draft")],
            env=client_environment(server, tmp_path / "two"),
            capture_output=True,
            text=True,
        )
        assert used.returncode == 0, used.stderr
        assert used.stdout.strip() == "same"
    left = [p for p in (tmp_path / "one").rglob("*") if p.is_file() and p.name != "token"]
    assert not [p for p in left if TOKEN.encode() in p.read_bytes()]
