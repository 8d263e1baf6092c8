"""Find a model on this machine or on the Hub, and read what decides about it before its weights."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from fastdraft_hf._atomic import read_json
from fastdraft_hf._errors import FastDraftError, nearest
from fastdraft_hf.target.embedded import EMBEDDED_ID, PACKAGE, embedded_target

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

# Always the packaged copy, so that a recipe gives the same model with and without the Hub.
EMBEDDED_NAME = "embedded:smollm2-135m-instruct"

# A model beyond these sizes would fill the memory before an error comes.
_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads")
_LARGEST = {"num_hidden_layers": 1000, **dict.fromkeys(_SIZES, 10_000_000)}

# What a chat template may use for a chat of a few words: seconds, bytes; characters of the text.
_TEMPLATE_SECONDS, _TEMPLATE_BYTES, _TEMPLATE_TEXT = 5, 1 << 29, 1 << 20
_tried_templates: set[str] = set()

# Weights, tokenizer and configs; no pickles, no code.
_PATTERNS = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "LICENSE*", "README.md"]


@dataclass(frozen=True)
class Target:
    """A model on this machine.

    Attributes:
        path: its folder, readable by ``from_pretrained``.
        name: the Hub id when known, else the folder's name; used in cards and provenance.
        revision: the Hub commit or the packaged file's sha256, when known.
        license: the license identifier that the model declares, when known.
    """

    path: Path
    name: str
    revision: str | None = None
    license: str | None = None


def resolve_target(
    target: str, revision: str | None = None, *, weights: bool = True, key: str = "target"
) -> Target:
    """Find ``target``: a folder, ``embedded:NAME``, or a model id on the Hub.

    Args:
        target: the value of ``target`` in a recipe.
        revision: a branch, tag or commit on the Hub.
        weights: whether its weights are needed. Without, only config and tokenizer are downloaded.
        key: the setting that named the model, for errors.

    Raises:
        FastDraftError: the model is not found, has no safetensors weights, needs code of its own,
            has no row for a token of its chat template, or a file is damaged (`check_model`).
    """
    check_name(target, key)
    if target == EMBEDDED_NAME:
        return _embedded(key)
    folder = Path(target).expanduser()
    if folder.is_dir():
        with _reading(f"{key}: {folder} cannot be read"):
            return _describe(folder, key, weights=weights)
    return _from_hub(target, revision, key, weights=weights)


def folder_name(target: str) -> str:
    """Return the name of the folder for what is made from a model: its own without the owner."""
    return Path(target).name.replace(":", "-")


def check_name(target: str, key: str = "target") -> None:
    """Raise `FastDraftError` for a name that no model can have; the Hub is not asked."""
    if target.startswith("embedded:") and target != EMBEDDED_NAME:
        raise FastDraftError(
            f"{key}: no embedded model '{target}'{nearest(target, [EMBEDDED_NAME])}; known: "
            f"{EMBEDDED_NAME}"
        )
    path = Path(target).expanduser()
    if path.is_file() or target.endswith(".gguf"):
        raise FastDraftError(
            f"{key}: {path} is a file; give the folder of a model in the Hugging Face format"
        )
    if (target.startswith((".", "/", "~")) or target.count("/") > 1) and not path.is_dir():
        raise FastDraftError(f"{key}: the folder {path} does not exist")


def load_tokenizer(
    folder: Path | str, key: str | None = None, mode: Mapping[str, Any] | None = None
) -> PreTrainedTokenizerBase:
    """Load a model's tokenizer, whose chats are in a mode (`chat_template_kwargs`).

    Raises:
        FastDraftError: with ``key``, which named the model.
    """
    tokenizer = cast("PreTrainedTokenizerBase", _load("tokenizer", folder, key))
    template = str(tokenizer.chat_template or "")
    if template not in _tried_templates and not _template_ends(tokenizer):
        raise FastDraftError(
            f"{key or 'tokenizer'}: the chat template in {folder} needs more than "
            f"{_TEMPLATE_SECONDS} s or {_TEMPLATE_BYTES >> 20} MiB for a short chat; fix it"
        )
    _tried_templates.add(template)
    if mode:
        chat: Any = tokenizer.apply_chat_template
        tokenizer.apply_chat_template = functools.partial(chat, **mode)
    return tokenizer


def _template_ends(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether short chats are rendered within limits, which the system sets a child."""
    if not hasattr(os, "fork"):  # Windows
        return True
    import resource

    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1] == 0
    status, render = 1, tokenizer.apply_chat_template
    try:
        with contextlib.suppress(OSError, ValueError):  # not Linux, or a lower limit already
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + _TEMPLATE_BYTES,) * 2)
        resource.setrlimit(resource.RLIMIT_CPU, (_TEMPLATE_SECONDS,) * 2)
        for roles in (["user"], ["system", "user"], ["user", "assistant", "user"]):
            chat = [{"role": role, "content": role} for role in roles]
            try:
                text = render(chat, tokenize=False, add_generation_prompt=True)
            except (MemoryError, OverflowError):
                raise
            except Exception:  # it refuses such a chat
                continue
            assert len(text) < _TEMPLATE_TEXT
        status = 0
    finally:
        os._exit(status)


def load_config(folder: Path | str, key: str | None = None) -> PretrainedConfig:
    """Load a model's config as `load_tokenizer` does; its sizes must be possible ones."""
    config = cast("PretrainedConfig", _load("config", folder, key))
    for name, largest in _LARGEST.items():
        size = getattr(config.get_text_config(), name, None)
        if isinstance(size, int) and not 0 < size <= largest:
            where = f"{key}: {folder}" if key else folder
            raise FastDraftError(f"{where}: {name} is {size:,}, must be from 1 to {largest:,}")
    return config


def _load(what: str, folder: Path | str, key: str | None) -> Any:
    from transformers import AutoConfig, AutoTokenizer

    kind = AutoConfig if what == "config" else AutoTokenizer
    where = f"{key}: " if key else ""
    with _reading(f"{where}no {what} can be read in {folder}"):
        try:
            return kind.from_pretrained(folder, trust_remote_code=False)
        except ValueError as error:
            if "trust_remote_code" in str(error):
                raise needs_code(f"{where}the {what} in {folder}") from None
            raise


@contextlib.contextmanager
def _reading(what: str) -> Iterator[None]:
    """Make one line of whatever a library raises for a file that is damaged or not what it says."""
    try:
        yield
    except FastDraftError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        if not isinstance(error, (OSError, ValueError, ImportError)):
            reason = f"{type(error).__name__}: {reason}"
        raise FastDraftError(f"{what} ({reason})") from error


def meta_model(config: PretrainedConfig, **kwargs: Any) -> PreTrainedModel:
    """Return the model that `from_pretrained` picks for a config, on torch's meta device.

    It is the text part alone where the family has a class for that (Qwen3.5).
    """
    import torch
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM

    cls = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if cls is not None and cls.config_class is config.sub_configs.get("text_config"):
        config = config.get_text_config()
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, **kwargs)
    return model


def check_model(folder: Path, key: str) -> None:
    """Raise `FastDraftError` for a model whose tokenizer, config or weights cannot be loaded.

    Its weights must have every tensor of the model, in the model's shapes; a tied head has none of
    its own. They are compared on torch's meta device: of the files only the headers are read, and
    the first row of each tensor, which must not be NaN. Quantized weights are not compared.
    """
    import torch
    from safetensors import safe_open
    from transformers import GenerationConfig

    read: Any = safe_open
    config, tensors = load_config(folder, key), {}
    load_tokenizer(folder, key)
    with _reading(f"{key}: {folder}: eos_token_id or generation_config.json cannot be read"):
        _ = stored_eos(folder), _config_eos(folder)
        if (folder / "generation_config.json").is_file():
            GenerationConfig.from_pretrained(folder)
    for file in weight_files(folder):
        with _reading(f"{key}: {file} cannot be read"), read(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                stored = opened.get_slice(name)
                tensors[name] = torch.empty(shape := stored.get_shape(), device="meta")
                if shape and stored[: 1 if len(shape) > 1 else None].float().isnan().any():
                    raise ValueError(f"{name} is NaN")
    with _reading(f"{key}: {folder} cannot be loaded"):
        if getattr(config, "quantization_config", None) is not None:
            return
        model = meta_model(config, dtype=torch.float32)
        _, info = type(model).from_pretrained(
            None,
            config=model.config,
            state_dict=tensors,
            device_map="meta",
            dtype=torch.float32,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    wrong = [name for name, *_ in sorted(info["mismatched_keys"])]
    for names, what in ((sorted(info["missing_keys"]), "lack"), (wrong, "have another shape of")):
        if names:
            raise FastDraftError(
                f"{key}: {folder}: the weights {what} {len(names):,} tensors of its config "
                f"({', '.join(names[:3])}); copy or convert the model again"
            )


def check_finite(folder: Path) -> None:
    """Read all weights of a model, and raise `FastDraftError` if one is NaN or infinite."""
    from safetensors import safe_open

    read: Any = safe_open
    for file in weight_files(folder):
        with _reading(f"{file} cannot be read"), read(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                parts = opened.get_tensor(name).flatten().split(1 << 24)
                if not all(part.float().isfinite().all() for part in parts):
                    raise ValueError(f"{name} holds NaN or infinity; copy or convert it again")


def weight_files(folder: Path) -> list[Path]:
    """Return the files that ``from_pretrained`` reads a folder's weights from."""
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    index = _stored(folder / "model.safetensors.index.json")
    return sorted({folder / name for name in index.get("weight_map", {}).values()})


def needs_code(where: str) -> FastDraftError:
    """Return the error of a model that transformers cannot load without the model's own code."""
    return FastDraftError(
        f"{where} needs the Python code of its repository (auto_map), which is never run: "
        "trust_remote_code is not supported. Use a model type that transformers has"
    )


def stop_ids(folder: Path, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Return the ids that end a completion of a target.

    These are the EOS tokens of its generation config, else of its config, else of its tokenizer,
    and ``<|endoftext|>`` where the vocabulary has it.

    Raises:
        FastDraftError: none of the three has an EOS token.
    """
    ids = set(stored_eos(folder)) or _config_eos(folder) or set(_ids(tokenizer.eos_token_id))
    if not ids:
        raise FastDraftError(
            f"target: {folder} has no EOS token; set eos_token_id in its generation_config.json"
        )
    vocabulary = tokenizer.get_vocab()
    return ids | ({vocabulary["<|endoftext|>"]} if "<|endoftext|>" in vocabulary else set())


def all_end_ids(folder: Path, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Return all EOS ids of a model: generation config's, config's and tokenizer's."""
    return {*stored_eos(folder), *_config_eos(folder), *_ids(tokenizer.eos_token_id)}


def stored_eos(folder: Path) -> list[int]:
    """Return the EOS ids of a model's generation config in their order; [] without that file."""
    return _ids(_stored(folder / "generation_config.json").get("eos_token_id"))


def _config_eos(folder: Path) -> set[int]:
    config = _stored(folder / "config.json")
    return {*_ids(config.get("eos_token_id")), *_ids(_text_part(config).get("eos_token_id"))}


def _ids(value: Any) -> list[int]:
    if value is None:
        return []
    return [int(v) for v in value] if isinstance(value, (list, tuple)) else [int(value)]


def _stored(file: Path) -> dict[str, Any]:
    """Return the content of a JSON file, {} where there is none."""
    value = read_json(file) if file.is_file() else {}
    return value if isinstance(value, dict) else {}


def _text_part(config: dict[str, Any]) -> dict[str, Any]:
    part = config.get("text_config")
    return part if isinstance(part, dict) else config


def _describe(folder: Path, key: str, *, weights: bool = True) -> Target:
    config, where = _stored(folder / "config.json"), f"{key}: {folder}"
    if not config:
        raise FastDraftError(f"{where} holds no config.json, so it is not a model folder")
    if weights and not weight_files(folder):
        raise FastDraftError(
            f"{where} holds no .safetensors weights; pickled weights are not loaded. "
            "Convert them with `model.save_pretrained(folder)`."
        )
    if "auto_map" in config:
        from transformers import CONFIG_MAPPING

        if config.get("model_type") not in CONFIG_MAPPING:
            raise needs_code(where)
    if weights:
        check_model(folder, key)
    _check_added_tokens(folder, _text_part(config).get("vocab_size"), where)
    return Target(folder, folder.resolve().name)


def _embedded(key: str) -> Target:
    # Its files came out of a package whose digest was checked.
    found, license = _describe(embedded_target(), key, weights=False), PACKAGE.license
    return replace(found, name=EMBEDDED_ID, revision=f"sha256:{PACKAGE.sha256}", license=license)


def _check_added_tokens(folder: Path, rows: int | None, where: str) -> None:
    """Raise where the chat template or a role uses an added token beyond the model's rows.

    Such a token alone is no error: Gemma 3 names one for images that its text models never see.
    """
    settings = _stored(folder / "tokenizer_config.json")
    roles = [settings.get(f"{role}_token") for role in ("bos", "eos", "pad")]
    used = [r.get("content") if isinstance(r, dict) else r for r in roles]
    templates = [file.read_text(encoding="utf-8") for file in folder.glob("*.jinja")]
    template = "".join([str(settings.get("chat_template", "")), *templates])
    for added in _stored(folder / "tokenizer.json").get("added_tokens") or []:
        token, index = added["content"], added["id"]
        if rows is not None and index >= rows and (token in used or token in template):
            raise FastDraftError(
                f"{where}: the tokenizer's '{token}' has id {index:,} and the model has only "
                f"{rows:,} rows; call model.resize_token_embeddings(len(tokenizer)) and save it, "
                "or remove the token"
            )


def _from_hub(model_id: str, revision: str | None, key: str, *, weights: bool = True) -> Target:
    from huggingface_hub import ModelCard, errors, snapshot_download

    patterns = _PATTERNS if weights else _PATTERNS[1:]
    try:
        path = Path(snapshot_download(model_id, revision=revision, allow_patterns=patterns))
    except (errors.HFValidationError, OSError) as error:
        reasons: dict[type[Exception], str] = {
            errors.HFValidationError: "is neither a folder nor a model id",
            errors.GatedRepoError: "is gated; accept its terms on its page and run `hf auth login`",
            errors.RevisionNotFoundError: f"has no revision '{revision}'",
            errors.RepositoryNotFoundError: "is not on the Hub, or is private (`hf auth login`)",
        }
        reason = next((text for kind, text in reasons.items() if isinstance(error, kind)), None)
        if reason is None and model_id == EMBEDDED_ID and revision is None:
            logger.warning("the Hub cannot be reached: using the packaged copy of %s", EMBEDDED_ID)
            return _embedded(key)
        reason = reason or (
            "is not on this machine and the Hub cannot be reached; give a folder, or use "
            f"{EMBEDDED_NAME}"
        )
        raise FastDraftError(f"{key}: '{model_id}' {reason}") from error
    _describe(path, key, weights=weights)
    card = path / "README.md"
    license = getattr(ModelCard.load(card).data, "license", None) if card.is_file() else None
    # A snapshot's folder is named by its commit.
    return Target(path, model_id, path.name, license if isinstance(license, str) else None)
