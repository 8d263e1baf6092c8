"""`fastdraft push` and `pull` through the real client, over HTTP, with requests that break."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_server import (
    ATTRIBUTES,
    READ_TOKEN,
    TOKEN,
    Entry,
    HubServer,
    Repo,
    gathered,
)
from transformers import AutoModelForCausalLM

from fastdraft_hf._errors import FastDraftError
from fastdraft_hf.hub import push as client
from fastdraft_hf.hub.push import pull, push

Command = Callable[..., tuple[int, str]]
REPO = "user/draft"


def send(folder: Path, openvino: bool = False, **given: Any) -> str:
    return push(gathered(folder, openvino=openvino), REPO, **given)


def same_files(one: Path, other: Path) -> None:
    names = {p.relative_to(one).as_posix() for p in one.rglob("*") if p.is_file()}
    written = {"README.md", "provenance.json", "config.json", "tokenizer_config.json"}
    for name in names - written:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


def test_up_and_down_again(run_folder: Path, hub: HubServer, fastdraft: Command) -> None:
    status, said = fastdraft("push", run_folder, "--repo-id", REPO, "--dry-run")
    assert status == 0
    assert "model.safetensors" in said
    assert hub.log == []
    status, said = fastdraft("push", run_folder, "--repo-id", REPO)
    assert status == 0, said
    assert f"{hub.url}/{REPO}" in said
    assert TOKEN not in said
    repo = hub.models[REPO]
    titles = [commit.title for commit in repo.history()]
    assert titles == ["Draft made with fastdraft_hf", "initial commit"]
    assert not repo.private
    files = repo.history()[0].files
    assert set(files) == {
        ".gitattributes",
        "model.safetensors",
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "README.md",
        "provenance.json",
        "custom_generate/generate.py",
        "custom_generate/requirements.txt",
    }
    assert files["model.safetensors"].lfs is not None
    card = files["README.md"].content.decode()
    assert f'AutoModelForCausalLM.from_pretrained("{REPO}")' in card
    assert str(run_folder) not in card

    place = run_folder.parent / "pulled"
    status, said = fastdraft("pull", REPO, place)
    assert status == 0, said
    assert said.startswith(f"{place}\n")
    same_files(run_folder / "draft", place)
    plain = AutoModelForCausalLM.from_pretrained(REPO)
    local = AutoModelForCausalLM.from_pretrained(run_folder / "draft").state_dict()
    assert all(torch.equal(local[name], value) for name, value in plain.state_dict().items())
    assert plain.generation_config.num_assistant_tokens == 3


def test_nothing_private_goes_up(run_folder: Path, hub: HubServer) -> None:
    draft = run_folder / "draft"
    for name in ("config.json", "tokenizer_config.json"):
        config = json.loads((draft / name).read_text(encoding="utf-8"))
        private = {"_name_or_path": "/home/me/target", "name_or_path": "~/x", "use_cache": False}
        (draft / name).write_text(json.dumps({**config, **private}), encoding="utf-8")
    (draft / "custom_generate" / "generate.py").write_text("import os\n", encoding="utf-8")
    record = run_folder / "align" / "provenance.json"
    content = json.loads(record.read_text(encoding="utf-8"))
    command = f"/opt/bin/fastdraft run r.yaml hub_token={TOKEN} x=C:\\me\\r.yaml a/b"
    record.write_text(json.dumps({**content, "command": command}), encoding="utf-8")
    send(run_folder)
    files = hub.models[REPO].history()[0].files
    assert not [name for name, entry in files.items() if TOKEN.encode() in entry.content]
    config = json.loads(files["config.json"].content)
    assert config["use_cache"] is True
    assert not {"_name_or_path", "name_or_path"} & config.keys()
    assert b"/home/me" not in files["tokenizer_config.json"].content
    assert b"def generate" in files["custom_generate/generate.py"].content  # from the package
    records = json.loads(files["provenance.json"].content)
    assert {"design", "align", "card"} <= records.keys()
    assert records["align"]["command"] == ("fastdraft run r.yaml hub_token=[redacted] x=r.yaml a/b")
    assert records["design"]["command"] == "fastdraft run r.yaml output_dir=run"


@pytest.mark.parametrize("name", ["README.md", "config.json", "chat_template.jinja", "NOTICE.x"])
def test_a_token_in_a_file_is_never_sent(run_folder: Path, hub: HubServer, name: str) -> None:
    path = run_folder / "draft" / name
    key = "-----BEGIN OPENSSH PRIVATE KEY-----"
    text = {"NOTICE.x": key, "README.md": f"---\nbase_model: org/Target\n---\n{TOKEN}\n"}
    path.write_text(text.get(name, json.dumps({"a": TOKEN})), encoding="utf-8")
    with pytest.raises(FastDraftError, match=f"{name} holds what looks like a token or") as caught:
        send(run_folder)
    assert TOKEN not in str(caught.value)
    assert hub.log == []


@pytest.mark.parametrize(
    "name",
    ["chat_template.jinja", "README.md", "notes", "openvino-int8", "openvino-int8/x.bin"],
)
def test_symbolic_links_are_refused(
    run_folder: Path, hub: HubServer, tmp_path: Path, name: str
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "openvino_model.xml").write_text("<xml/>", encoding="utf-8")
    path = run_folder / "draft" / name
    if name.endswith(".bin"):
        shutil.copytree(elsewhere, path.parent)
    path.unlink(missing_ok=True)
    path.symlink_to(elsewhere)
    with pytest.raises(FastDraftError, match=f"{name} is a symbolic link"):
        send(run_folder, openvino="openvino" in name)
    assert hub.log == []


def test_private_and_a_branch(run_folder: Path, hub: HubServer, fastdraft: Command) -> None:
    words = ("push", run_folder, "--repo-id", REPO, "--private", "--revision", "v2")
    assert fastdraft(*words)[0] == 0
    repo = hub.models[REPO]
    assert repo.private
    assert list(repo.at("main").files) == [".gitattributes"]
    assert "model.safetensors" in repo.at("v2").files
    same_files(run_folder / "draft", pull(REPO, run_folder.parent / "pulled", "v2"))
    with pytest.raises(FastDraftError, match="Revision Not Found"):
        pull(REPO, run_folder.parent / "other", "v3")


def test_a_second_push(run_folder: Path, hub: HubServer, tiny_model: Any) -> None:
    """Nothing new is no commit; another draft replaces what the first one left, and no more."""
    send(run_folder)
    repo = hub.models[REPO]
    before, uploads = repo.history(), list(hub.uploaded)
    send(run_folder)
    assert repo.history() == before
    assert hub.uploaded == uploads
    theirs = {"picture.png": Entry(b"png"), "onnx/model.safetensors": Entry(b"own")}
    stale = ("model-00001-of-00002.safetensors", "openvino-int8/openvino_model.bin")
    kept = {**before[0].files, **theirs, **{name: Entry(b"old") for name in stale}}
    repo.add("main", "by hand", kept)
    draft = tiny_model(seed=7)
    draft.generation_config.num_assistant_tokens = 3
    draft.save_pretrained(run_folder / "draft")
    send(run_folder)
    files = repo.history()[0].files
    assert theirs.keys() <= files.keys()
    assert not files.keys() & set(stale)
    assert len(repo.history()) == 4


def test_a_name_that_is_taken(run_folder: Path, hub: HubServer, fastdraft: Command) -> None:
    repo = hub.models[REPO] = Repo(private=True)
    theirs = {".gitattributes": Entry(ATTRIBUTES), "model.safetensors": Entry(b"theirs")}
    repo.add("main", "theirs", theirs)
    status, said = fastdraft("push", run_folder, "--repo-id", REPO)
    assert status == 2
    assert f"push: {REPO} exists and was not made by fastdraft_hf" in said
    assert hub.uploaded == []
    assert fastdraft("push", run_folder, "--repo-id", REPO, "--overwrite")[0] == 0
    assert repo.history()[0].files["model.safetensors"].content != b"theirs"
    for record in run_folder.rglob("provenance.json"):
        text = record.read_text(encoding="utf-8").replace("org/Target", "org/Second")
        record.write_text(text, encoding="utf-8")
    with pytest.raises(FastDraftError, match="is a draft for org/Target, not for org/Second"):
        send(run_folder)
    repo.add("main", "emptied", {".gitattributes": Entry(ATTRIBUTES)})
    send(run_folder)
    assert repo.private  # an existing repository keeps its visibility


@pytest.mark.parametrize(
    ("token", "said"),
    [
        (None, "^push: Token is required .* no token found.* `hf auth login`"),
        ("hf_" + "WrongTokenWrongToken", "Invalid user token"),
        (READ_TOKEN, f"403 Forbidden: You don't have the rights to create or write {REPO}"),
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


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "give --repo-id USER/NAME, or --to-folder FOLDER"),
        (("--repo-id", "draft"), "--repo-id: 'draft' is not a repository id such as user/name"),
        (("--repo-id", "a b/c"), "--repo-id: 'a b/c' is not a repository id"),
        (("--repo-id", REPO, "--openvino"), "--openvino: "),
        (("--to-folder", "x/y", "--private"), "--private and --revision are for the Hub"),
    ],
)
def test_bad_options(
    run_folder: Path, fastdraft: Command, words: tuple[str, ...], said: str
) -> None:
    status, printed = fastdraft("push", run_folder, *words)
    assert status == 2
    assert said in printed


def test_folders_without_a_draft(run_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FastDraftError, match="no such folder"):
        gathered(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FastDraftError, match="neither a run's folder nor a draft's"):
        gathered(tmp_path / "empty")
    draft = run_folder / "draft"
    (draft / "model.safetensors").rename(draft / "model.bin")
    with pytest.raises(FastDraftError, match=r"holds no \.safetensors weights"):
        gathered(run_folder)
    (draft / "generation_config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(FastDraftError, match="has no num_assistant_tokens"):
        gathered(run_folder)
    shutil.rmtree(draft)
    with pytest.raises(FastDraftError, match="holds no finished draft yet"):
        gathered(run_folder)


def test_a_card_that_somebody_edited_is_kept(run_folder: Path) -> None:
    draft = run_folder / "draft"
    text = f'---\nbase_model: org/Target\n---\nMy words.\ndraft = A.from_pretrained("{draft}")\n'
    (draft / "README.md").write_text(text, encoding="utf-8")
    card = (gathered(run_folder) / "README.md").read_text(encoding="utf-8")
    assert "My words." in card
    assert f'from_pretrained("{REPO}")' in card
    assert "- fastdraft" in card  # so that the next push knows its own
    (draft / "README.md").write_text(text + "See /home/me/notes.txt\n", encoding="utf-8")
    with pytest.raises(FastDraftError, match=r"names a path of this machine, /home/me/notes\.txt"):
        gathered(run_folder)


@pytest.mark.parametrize(
    ("metadata", "said"),
    [
        ("base_model: a/b\nlicense: a b", "README.md: license: the Hub has no license 'a b'"),
        ("base_model: a/b\nlicense: [mit, 7]", "README.md: license: the Hub has no license '7'"),
        ("base_model: a/b\nlanguage: english", "README.md: language: 'english' is not a lang"),
        ("base_model: a/b\ntags: [1]", "README.md: tags: expected texts"),
        ("tags: [a]", "base_model: the Hub must know whose draft this is"),
        ("model-index: [{name: x}]", "README.md: metadata: "),
        ("a: [", "README.md: metadata: "),
    ],
)
def test_a_card_against_the_hubs_rules(
    run_folder: Path, hub: HubServer, metadata: str, said: str
) -> None:
    """Before the Hub is reached: `--dry-run` and `--to-folder` refuse the same."""
    (run_folder / "draft" / "README.md").write_text(f"---\n{metadata}\n---\n# x\n")
    with pytest.raises(FastDraftError, match=said):
        gathered(run_folder)
    assert hub.log == []


# ---------------------------------------------------------------------------------------- faults


def requests_of(call: Callable[[], Any], hub: HubServer) -> int:
    """Return how many requests a call makes."""
    before = len(hub.log)
    call()
    return len(hub.log) - before


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
    assert len(said) < 400
    return said


@pytest.mark.parametrize(
    ("kind", "times"),
    [("500", 1), ("reset", 100), ("lost", 1), ("truncated", 1)],
)
def test_every_request_of_a_push_may_break(
    run_folder: Path, hub: HubServer, kind: str, times: int
) -> None:
    """Each ends in success or in one clear line; then the same call succeeds, nothing doubled."""
    files = gathered(run_folder)
    total = requests_of(lambda: push(files, REPO), hub)
    assert total > 8
    wanted = hub.models[REPO].history()[0].files
    refused = 0
    for number in range(total):
        hub.models.clear()
        hub.uploaded.clear()
        hub.break_at(kind, number, times)
        said = message_of(lambda: push(files, REPO))
        refused += said != ""
        assert said == "" or said.startswith("push: ")
        for repo in hub.models.values():  # all of it or nothing
            assert len(repo.history()) in (1, 2)
        hub.heal()
        push(files, REPO)
        assert hub.models[REPO].history()[0].files == wanted, number
        assert len(hub.models[REPO].history()) == 2, number
        if times == 1:  # a large file is sent once; where the storage's answer was lost, twice
            again = len(hub.uploaded) - len(set(hub.uploaded))
            assert again <= (0 if kind in ("500", "reset") else 1), number
    assert refused > 0 or times == 1


def test_no_answer(run_folder: Path, hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "TIMEOUT_SECONDS", 0.2)
    files = gathered(run_folder)
    hub.break_at("silent", 0)
    with pytest.raises(FastDraftError, match="could not be reached or broke off"):
        push(files, REPO)
    hub.heal()
    hub.server.server_close()
    hub.server.shutdown()
    with pytest.raises(FastDraftError, match="could not be reached or broke off"):
        push(files, REPO)


# ------------------------------------------------------------------------------------------ pull


def test_a_damaged_file_is_noticed(run_folder: Path, hub: HubServer, tmp_path: Path) -> None:
    send(run_folder)
    place = pull(REPO, tmp_path / "pulled")
    weights = place / "model.safetensors"
    good = weights.read_bytes()
    weights.write_bytes(good[:-1] + b"x")
    pull(REPO, place)
    assert weights.read_bytes() == good
    for number in range(requests_of(lambda: pull(REPO, tmp_path / "again"), hub)):
        hub.break_at("truncated", number)
        said = message_of(lambda: pull(REPO, tmp_path / "broken"))
        assert said == "" or said.startswith("pull: ")
        hub.heal()
        same_files(run_folder / "draft", pull(REPO, tmp_path / "broken"))
    entry = hub.models[REPO].history()[0].files["model.safetensors"]
    entry.content = good[:-1] + b"y"  # what the Hub sends is not what it says
    with pytest.raises(FastDraftError, match="is not what the Hub says it is"):
        pull(REPO, tmp_path / "other")


@pytest.mark.parametrize("name", ["../x.json", "/etc/x.json", "a/../../x", "C:\\x.json", "a\0b"])
def test_names_that_lead_elsewhere(hub: HubServer, tmp_path: Path, name: str) -> None:
    hub.models[REPO] = Repo(private=False)
    hub.models[REPO].add("main", "x", {"model.safetensors": Entry(b"x"), name: Entry(b"{}")})
    with pytest.raises(FastDraftError, match=r"has a file named .*; not downloaded"):
        pull(REPO, tmp_path / "deep" / "pulled")
    assert not [path for method, path in hub.log if "/resolve/" in path]


def test_what_cannot_be_pulled(
    hub: HubServer, tmp_path: Path, run_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(FastDraftError, match="Repository Not Found"):
        pull("user/none")
    with pytest.raises(FastDraftError, match="Repo id must"):
        pull("a b")
    hub.models["user/pickle"] = Repo(private=False)
    hub.models["user/pickle"].add("main", "x", {"pytorch_model.bin": Entry(b"pickle")})
    with pytest.raises(FastDraftError, match=r"holds no \.safetensors weights"):
        pull("user/pickle")
    send(run_folder)
    with pytest.raises(FastDraftError, match="already holds a model"):
        pull(REPO, run_folder / "draft")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FastDraftError, match="HF_HUB_OFFLINE"):
        pull(REPO)
