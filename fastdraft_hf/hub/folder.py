"""A run's folder as the Hub's commands read it, and what a draft's repository holds.

It goes by the names of folders and imports no stage, so that a folder copied from another machine
can be pushed too.
"""

import functools
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import get_token

from fastdraft_hf._atomic import publish_folder, read_json, sha256_file, write_json
from fastdraft_hf._card import (
    CARD,
    PROVENANCE,
    TAGS,
    check_texts,
    draft_files,
    is_model_id,
    load_card,
)
from fastdraft_hf._errors import FastDraftError, change_texts, redacted
from fastdraft_hf.decode.settings import read_draft_tokens
from fastdraft_hf.eval.summary import TRAINING_STAGES, RunSummary, read_summary
from fastdraft_hf.hub.card import render_card

# Stage to folder, in the order of a run; a test compares it with the stages' own.
FOLDERS = {
    **{name: name for name in ("design", "generate", "logits", *TRAINING_STAGES)},
    "reduced_vocabulary": "reduced",
    **{name: name for name in ("export", "evaluate", "bench")},
    "card": "draft",
    "report": "report",
}
# What optimum-intel writes. Its .bin files hold numbers only.
_OPENVINO_FILES = ("*.xml", "*.bin", "*.json", "*.jinja", "*.txt", "*.model")
_ABSOLUTE_PATH = re.compile(r"(?<![\w/.:>-])(?:~?/|[A-Za-z]:\\)(?:[^\s/\\\"'=,]+[/\\])+")
# Keys of configs that say where a model came from on this machine.
_PRIVATE_KEYS = ("_name_or_path", "name_or_path", "_model_name_or_path")
# fastdraft_hf is not listed: without it the folder still works.
_REQUIREMENTS = """\
transformers>=5.5
# fastdraft-hf: optional; with it the faster loop is used, and batches larger than one
"""


@dataclass
class RunFolder:
    """A draft and the run that made it.

    Attributes:
        draft: the checkpoint's folder.
        run: the run's folder, ``None`` for a draft without its run.
    """

    draft: Path
    run: Path | None

    @functools.cached_property
    def summary(self) -> RunSummary:
        """The run's records; empty without a run."""
        run = self.run
        return read_summary({} if run is None else {s: run / name for s, name in FOLDERS.items()})

    @functools.cached_property
    def records(self) -> dict[str, Any]:
        """The provenance of every stage; for a draft without its run, what it came with."""
        record = read_record(self.draft)
        alone = {record["stage"]: record} if "stage" in record else record
        return dict(self.summary.provenance) or alone

    def openvino_folders(self) -> list[Path]:
        """Return the draft's finished OpenVINO folders, beside it or in the run's export."""
        parents = [self.draft, *([self.run / "export"] if self.run else [])]
        found = [f for parent in parents for f in sorted(parent.glob("openvino-*"))]
        named = [f for f in found if re.fullmatch(r"openvino-[\w.-]+", f.name)]
        return [f for f in named if (f / "openvino_model.xml").is_file()]


def find_run(folder: Path) -> RunFolder:
    """Find the draft and the run that ``folder`` is or contains.

    Raises:
        FastDraftError: there is no finished draft.
    """
    if not folder.is_dir():
        raise FastDraftError(f"no such folder: {folder}")
    if (folder / "config.json").is_file():
        parent = folder.resolve().parent
        return RunFolder(folder, parent if folder.name == "draft" and _is_run(parent) else None)
    draft = folder / FOLDERS["card"]
    if (draft / "config.json").is_file():
        return RunFolder(draft, folder)
    if _is_run(folder):
        raise FastDraftError(
            f"{folder} holds no finished draft yet; finish the run with `fastdraft run`"
        )
    raise FastDraftError(
        f"{folder} is neither a run's folder nor a draft's: it has no config.json and no draft/"
    )


def _is_run(folder: Path) -> bool:
    return (folder / "recipe.yaml").is_file() or any(
        (folder / name / "provenance.json").is_file() for name in FOLDERS.values()
    )


def default_name(target: str, evaluation: dict[str, Any] | None) -> str:
    """Return a draft's default name: its target's, and its size where that is known."""
    base = re.sub(r"[^A-Za-z0-9._-]", "-", target.split("/")[-1])
    if evaluation is None:
        return f"{base}-FastDraft"
    return f"{base}-FastDraft-{evaluation['draft_parameters'] / 1e6:.0f}M"


def read_record(folder: Path) -> dict[str, Any]:
    """Return a folder's provenance record, empty when it has none."""
    path = folder / "provenance.json"
    try:
        record = read_json(path)
    except FileNotFoundError:
        return {}
    return record if isinstance(record, dict) else {}


def earlier_training(draft: Path) -> dict[str, Any] | None:
    """Return how long a draft was trained that this package made.

    Args:
        draft: a published draft's folder, a run's ``draft``, or the folder of one of its stages.

    Returns:
        ``tokens`` and ``seconds`` of its training stages and of the training before them; ``None``
        where no record says it.
    """
    records = read_record(draft)  # published: the records of all stages in one file
    if (stage := records.get("stage")) in FOLDERS:  # in a run: its own stage and those before
        before = list(FOLDERS)[: list(FOLDERS).index(stage) + 1]
        records = {name: read_record(draft.parent / FOLDERS[name]) for name in before}
    earlier = records.get("design", {}).get("facts", {}).get("earlier") or {}
    tokens, seconds = earlier.get("tokens", 0), earlier.get("seconds", 0.0)
    for found in filter(None, map(records.get, TRAINING_STAGES)):
        tokens += found["facts"].get("tokens", 0)
        seconds += found["wall_seconds"]
    return {"tokens": tokens, "seconds": round(seconds, 1)} if tokens else None


def chat_mode(draft: Path) -> dict[str, Any]:
    """Return the `chat_template_kwargs` of a draft's generated text; {} if none are known.

    The record came with the draft, so it may name no template of its own.
    """
    mode = find_run(draft).records.get("generate", {}).get("chat_template_kwargs") or {}
    plain = isinstance(mode, dict) and all(isinstance(v, bool | int | str) for v in mode.values())
    if not plain or "chat_template" in mode:
        raise FastDraftError(f"{draft / PROVENANCE}: chat_template_kwargs must be plain values")
    return mode


def write_custom_generate(folder: Path) -> None:
    """Write the ``custom_generate/`` folder of a draft's repository.

    With it, ``target.generate(custom_generate="the/repository", assistant_model=draft,
    trust_remote_code=True)`` decodes through `fastdraft_hf.assisted_decoding`.
    """
    code = folder / "custom_generate"
    code.mkdir(exist_ok=True)
    shutil.copyfile(Path(__file__).with_name("pushed_generate.py"), code / "generate.py")
    (code / "requirements.txt").write_text(_REQUIREMENTS, encoding="utf-8")


def gather(
    folder: Path, repo_id: str, output: Path, *, openvino: bool = False, dtype: str | None = None
) -> None:
    """Write the files of a draft's repository to a folder; the Hub is not reached.

    Args:
        folder: a run's folder, or a draft's.
        repo_id: the draft's repository, ``user/name``; the card loads the draft from it.
        output: an empty folder.
        openvino: add the draft's OpenVINO folders, each under its name.
        dtype: store the weights in this type, such as ``bfloat16``; ``None`` keeps theirs.

    Raises:
        FastDraftError: something is missing or not fit to be published; the file is named.
    """
    if not is_model_id(repo_id, owner=True):
        raise FastDraftError(f"--repo-id: '{repo_id}' is not a repository id such as user/name")
    found = find_run(folder)
    draft = found.draft
    if read_draft_tokens(draft) is None:
        raise FastDraftError(
            f"{draft}: generation_config.json has no num_assistant_tokens, so transformers would "
            "draft 20 tokens per round; set it, such as to 3"
        )
    files = draft_files(draft)
    if not any(name.endswith(".safetensors") for name in files):
        raise FastDraftError(f"{draft} holds no .safetensors weights; nothing else is pushed")
    for name in ("config.json", "tokenizer_config.json"):
        if name not in files:
            raise FastDraftError(f"{draft} holds no {name}")
    exported = found.openvino_folders() if openvino else []
    if openvino and not exported:
        raise FastDraftError(f"--openvino: {draft} has no OpenVINO folder")
    for one in exported:
        if one.is_symlink():
            raise FastDraftError(f"{one} is a symbolic link; only regular files are pushed")
        found_here = draft_files(one, _OPENVINO_FILES)
        files |= {f"{one.name}/{name}": file for name, file in found_here.items()}
    note = ""
    if dtype is not None:
        had = _cast(draft, dtype, output)
        if had != dtype:
            note = f"The weights are stored in {dtype}; the figures below were measured with {had}."
        files = {name: f for name, f in files.items() if "/" in name or ".safetensors" not in name}
    for name, file in files.items():
        (output / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(file, output / name)
    for name in ("config.json", "tokenizer_config.json"):
        config = read_json(output / name)
        for key in _PRIVATE_KEYS:
            config.pop(key, None)
        if config.get("use_cache") is False:  # a trainer's setting; a draft without it is slow
            config["use_cache"] = True
        if dtype is not None and name == "config.json":
            config.pop("torch_dtype", None)  # the key's older name
            config["dtype"] = dtype
        write_json(output / name, config)
    write_custom_generate(output)
    card = _card(found, repo_id, exported[0].name if exported else None, note)
    load_card(card)  # what the Hub would refuse
    (output / CARD).write_text(card, encoding="utf-8")
    if found.records:
        write_json(output / PROVENANCE, change_texts(found.records, _public))
    check_texts(files_below(output), get_token())


def files_below(folder: Path) -> dict[str, Path]:
    """Return the files of a folder and its folders by their paths in it."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {file.relative_to(folder).as_posix(): file for file in files}


def _public(text: str) -> str:
    """Return a record's text without credentials, absolute paths cut to their last part."""
    return _ABSOLUTE_PATH.sub("", redacted(text))


def _card(found: RunFolder, location: str, openvino: str | None, weights_note: str) -> str:
    """Return the card for a repository: rendered again, unless somebody edited it."""
    path = found.draft / CARD
    record = found.records.get("card", {})
    facts = record.get("facts", {})
    edited = path.is_file() and facts.get("card_sha256") != sha256_file(path)
    if found.summary.evaluation is not None and facts and not edited:
        facts = {**facts, **{key: record.get(key) for key in ("target", "target_revision")}}
        card = render_card(
            found.summary,
            facts,
            draft_location=location,
            openvino=openvino,
            weights_note=weights_note,
        )
        return str(card.content)
    if not path.is_file():
        raise FastDraftError(f"{found.draft} has no {CARD}; write one, or finish the run")
    text = path.read_text(encoding="utf-8")
    # The snippet of every card names what it loads the draft from.
    for old in set(re.findall(r'^draft = \w+\.from_pretrained\("([^"\n]+)"', text, re.MULTILINE)):
        text = re.sub(rf'(?<=[" ]){re.escape(old)}(?=[" /])', lambda _: location, text)
    card = load_card(text)
    card.data.tags = list(dict.fromkeys([*(card.data.get("tags") or []), *TAGS]))
    if not isinstance(card.data.get("base_model"), str):
        raise FastDraftError(
            f"{path}: base_model: the Hub must know whose draft this is; set card.base_model in "
            "the recipe to the target's id, or write it in this file"
        )
    return str(card.content)


def _cast(draft: Path, dtype: str, output: Path) -> str:
    """Save a draft's weights in another type; return the name of the type that they had."""
    import torch
    from transformers import AutoModelForCausalLM

    given: dict[str, Any] = {"use_safetensors": True, "trust_remote_code": False}
    model = AutoModelForCausalLM.from_pretrained(draft, dtype="auto", **given)
    had = str(model.dtype).removeprefix("torch.")
    model.to(getattr(torch, dtype)).save_pretrained(output)
    for name, weight in model.named_parameters():
        if not bool(torch.isfinite(weight).all()):
            raise FastDraftError(f"{name} is not finite in {dtype}; not pushed")
    return had


def replace_folder(new: Path, folder: Path) -> None:
    """Move a finished folder to ``folder``; replace the old one.

    A kill at any time leaves one of the two, or the old one as ``.NAME.old``.
    """
    old = folder.with_name(f".{folder.name}.old")
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.rename(folder, old)
    publish_folder(new, folder)
    shutil.rmtree(old, ignore_errors=True)
