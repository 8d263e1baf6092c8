"""A recipe: one YAML file that says which draft is made, from what and how.

Its sections are the configs of the packages they configure; the keys of the file are their fields.
``when`` holds changes for some machines (``cuda``: more tokens), and ``key=value`` arguments on the
command line apply last.
"""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import Field

from fastdraft_hf._config import Count, Key, Number, Section
from fastdraft_hf._errors import FastDraftError, change_texts, nearest, redacted, refuse_secrets
from fastdraft_hf._yaml import read_yaml
from fastdraft_hf.data.config import GenerateConfig, LogitsConfig
from fastdraft_hf.data.sources import check_source
from fastdraft_hf.draft.config import DesignConfig, ReducedVocabularyConfig
from fastdraft_hf.eval.config import BenchConfig, EvaluateConfig
from fastdraft_hf.export.gguf import GGUFType
from fastdraft_hf.export.openvino import WeightFormat
from fastdraft_hf.train.section import TrainingField, TrainingSection, training_section

_MOST_BYTES = 1_000_000  # of a recipe file


class ExportConfig(Section):
    """The draft in other engines' formats."""

    openvino: list[WeightFormat] = Field(
        ["int8"],
        description="weight formats of the draft's OpenVINO folders; empty for none. Without the "
        "openvino extra they are left out with a warning",
    )
    gguf: list[GGUFType] = Field(
        [], description="weight types of the draft's GGUF files, for llama.cpp"
    )
    acceptance_texts: Count = Field(
        8,
        ge=0,
        le=8,
        description="texts of the target on which the acceptance of every export is measured, at "
        "most 8; 0 for none",
    )


class CardConfig(Section):
    """The published folder: weights, tokenizer, generation config and model card."""

    model_name: str | None = Field(
        None, description="name on the card; by default <target>-FastDraft-<size>"
    )
    license: str | None = Field(None, description="license of the draft; by default the target's")
    base_model: str | None = Field(
        None, description="the target's id on the Hub, for a target that is given as a folder"
    )
    language: list[str] = Field([], description="language codes for the card, such as [en, de]")

    def check_values(self) -> None:
        from fastdraft_hf import _card as metadata

        if self.license is not None:
            metadata.check_license(self.license, "license")
        if self.base_model is not None:
            metadata.check_model_id(self.base_model, "base_model")
        metadata.check_languages(self.language, "language")


class Recipe(Section):
    """Everything one run needs. Training stages that are absent are skipped."""

    target: str = Field(
        "embedded:smollm2-135m-instruct",
        description="model id on the Hub, a folder, or embedded:smollm2-135m-instruct",
    )
    target_revision: str | None = Field(None, description="branch, tag or commit of a Hub target")
    chat_template_kwargs: dict[Key, Any] = Field(
        {}, description="of the target's chat template in all chats: {enable_thinking: false}"
    )
    output_dir: str = Field(
        "runs/draft", description="folder of the run; one folder a stage inside"
    )
    seed: Count = Field(0, ge=0, lt=2**32, description="of everything random")
    max_hours: Annotated[Number, Field(gt=0, le=10_000)] | None = Field(
        None,
        description="time for the whole run, divided by the stages' max_minutes; rows, tokens and "
        "measurements are cut to fit. The time in which nothing runs does not count",
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto, cpu or cuda")
    design: DesignConfig = Field(
        default_factory=DesignConfig, description="the draft's shape and initialization"
    )
    generate: GenerateConfig | None = Field(None, description="the target's generations")
    logits: LogitsConfig | None = Field(
        None,
        description="the target's top-k distribution, for objectives besides ce",
    )
    pretrain: TrainingField | None = Field(
        None, description="PT: next-token training from the initialization"
    )
    continue_: TrainingField | None = Field(
        None, description="CP: continued pre-training, usually with code", alias="continue"
    )
    align: TrainingField | None = Field(
        None, description="FT: training on the target's own answers"
    )
    reduced_vocabulary: ReducedVocabularyConfig | None = Field(
        None, description="the trained draft's head scores the most frequent tokens only"
    )
    export: ExportConfig = Field(default_factory=ExportConfig, description="other formats")
    evaluate: EvaluateConfig = Field(
        default_factory=EvaluateConfig, description="acceptance on held-out prompts"
    )
    bench: BenchConfig = Field(default_factory=BenchConfig, description="wall clock")
    card: CardConfig = Field(default_factory=CardConfig, description="the published folder")

    def __init__(self, **data: Any) -> None:
        refuse_secrets(data)
        super().__init__(**data)

    def check_values(self) -> None:
        names = {"target": self.target, "output_dir": self.output_dir}
        names["card.model_name"] = self.card.model_name or ""
        for key, name in names.items():  # they become parts of the card
            if not name.isprintable():
                raise FastDraftError(f"{key}: {name!r} has a control character; rename it")
        bench, exported = self.bench, self.export.openvino
        reads_export = {"openvino", "ours-openvino"} & set(bench.paths)
        if reads_export and exported and bench.weight_format not in exported:
            raise FastDraftError(
                f"bench.weight_format: {bench.weight_format} is not among export.openvino "
                f"({', '.join(exported)})"
            )
        self._name_logs()
        self._name_sets("logits", self.logits)
        asks = self.logits is not None and self.logits.engine == "server"
        if asks and (self.generate is None or self.generate.server is None):
            raise FastDraftError("logits.engine: server is generate.server's, which is not set")
        if self.reduced_vocabulary is not None:
            if self.generate is None or not self.generate.sets:
                raise FastDraftError(
                    "reduced_vocabulary: it counts the tokens of the generated sets, and the "
                    "recipe has no section generate"
                )
            self._name_sets("reduced_vocabulary", self.reduced_vocabulary)
        for name, stage in self.training_stages().items():
            self._check_training(name, stage)

    def _name_logs(self) -> None:
        """Give tasks of kind traffic that name no log that of the generated set."""
        sets = self.generate.sets.values() if self.generate else ()
        log = next((one for one in sets if one.kind == "traffic"), None)
        if log is None:
            return
        found = {"dataset": log.dataset, "model": log.model}
        for key in ("evaluate", "bench"):
            section = getattr(self, key)
            if isinstance(tasks := section.tasks, dict):
                tasks = {
                    name: task.model_copy(update=found)
                    if task.kind == "traffic" and task.dataset is None
                    else task
                    for name, task in tasks.items()
                }
                setattr(self, key, section.model_copy(update={"tasks": tasks}))

    def _name_sets(self, key: str, section: LogitsConfig | ReducedVocabularyConfig | None) -> None:
        """Check a section's ``sets``; by default they are those of align, or all without align.

        They are written out, so that the run records what the stage reads.
        """
        if section is None:
            return
        sets = self.generate.sets if self.generate else {}
        readable = self.generate.readable if self.generate else []
        for number, name in enumerate(section.sets):
            if name not in readable:
                raise FastDraftError(
                    f"{key}.sets[{number}]: generate has no set '{name}'{nearest(name, readable)}"
                )
        if not section.sets:
            read = sets if self.align is None else [one.name for one in self.align.sources]
            setattr(self, key, section.model_copy(update={"sets": list(dict.fromkeys(read))}))

    def _check_training(self, name: str, stage: TrainingSection) -> None:
        """Check a training stage's sources and distribution; write out its objective."""
        if not stage.sources:
            raise FastDraftError(f"{name}.sources: at least one source is needed")
        for number, source in enumerate(stage.sources):
            where = f"{name}.sources[{number}]"
            check_source(source, where, self.generate.readable if self.generate else ())
            if name == "align" and source.kind != "generated":
                raise FastDraftError(
                    f"{where}.kind: align reads generated sets only, not {source.kind}"
                )
        if name == "align" and stage.streaming:
            raise FastDraftError("align.streaming: for pretrain and continue only")
        wanted = stage.target_distribution
        if stage.objective == "auto":
            # nla where an alignment knows the target's distribution; measured: docs/objectives.md.
            known = wanted in ("stored", "online") or (wanted == "auto" and self.logits is not None)
            objective = "nla" if name == "align" and known else "ce"
            stage = stage.model_copy(update={"objective": objective})
            setattr(self, _field(name), stage)
        source_kind = distribution_source(self, name)
        if source_kind == "none" and stage.needs_distribution:
            raise FastDraftError(
                f"{name}.target_distribution: none, but objective {stage.objective} needs the "
                "target's distribution"
            )
        if source_kind == "stored":
            self._check_stored(name, stage)

    def _check_stored(self, name: str, stage: TrainingSection) -> None:
        if name != "align":
            raise FastDraftError(
                f"{name}.target_distribution: stored distributions belong to the target's answers "
                "(align); use online"
            )
        if self.logits is None:
            raise FastDraftError(
                "align.target_distribution: stored, but the recipe has no section logits"
            )
        if self.logits.temperature != stage.temperature:
            raise FastDraftError(
                f"align.temperature: {stage.temperature:g}, but "
                f"logits.temperature is {self.logits.temperature:g}; they must be the same"
            )
        for number, read in enumerate(stage.sources):
            if read.name not in self.logits.sets:
                raise FastDraftError(
                    f"align.sources[{number}]: set '{read.name}' is not among logits.sets"
                )

    def section(self, name: str) -> Section | None:
        """Return the section of a stage; ``None`` if the recipe has none."""
        found: Section | None = getattr(self, _field(name), None)
        return found

    def training_stages(self) -> dict[str, TrainingSection]:
        """Return the training stages the recipe has, by name, in order."""
        stages = {"pretrain": self.pretrain, "continue": self.continue_, "align": self.align}
        return {name: stage for name, stage in stages.items() if stage is not None}

    def resolved(self) -> dict[str, Any]:
        """Return the mapping this recipe could have been read from, defaults written out."""
        return self.model_dump(by_alias=True)


def _field(name: str) -> str:
    """Return the attribute of a section; ``continue`` is a keyword of Python."""
    return "continue_" if name == "continue" else name


def distribution_source(recipe: Recipe, name: str) -> str:
    """Return where a training stage gets the target's distribution: none, stored or online."""
    stage = recipe.training_stages()[name]
    if stage.target_distribution != "auto":
        return stage.target_distribution
    if not stage.needs_distribution:
        return "none"
    return "stored" if name == "align" and recipe.logits is not None else "online"


def sections() -> dict[str, type[Section]]:
    """Return the sections of a recipe by their keys."""
    found: dict[str, type[Section]] = {}
    for name, field in Recipe.model_fields.items():
        for kind in (field.annotation, *get_args(field.annotation)):
            kind = getattr(kind, "__origin__", kind)  # of an annotated type
            if isinstance(kind, type) and issubclass(kind, Section):
                training = kind is TrainingSection
                found[field.alias or name] = training_section() if training else kind
    return found


def recipe_schema() -> dict[str, Any]:
    """Return the JSON schema of a recipe file."""
    schema = Recipe.model_json_schema()
    training = training_section().model_json_schema()
    schema["$defs"] |= training.pop("$defs")
    schema["$defs"]["TrainingSection"] = training
    schema["properties"]["when"] = {
        "type": "object",
        "description": "changes by machine: cpu or cuda, each a mapping of key paths to values",
        "properties": {
            name: {"type": "object", "additionalProperties": True} for name in ("cpu", "cuda")
        },
        "additionalProperties": False,
    }
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def read_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file and apply ``when`` and the overrides.

    Raises:
        FastDraftError: the file is missing, is not YAML, or is not a valid recipe.
    """
    if not path.is_file():
        raise FastDraftError(f"the recipe file {path} does not exist")
    with path.open("rb") as stream:
        raw = stream.read(_MOST_BYTES + 1)
    if len(raw) > _MOST_BYTES:
        raise FastDraftError(f"{path}: larger than {_MOST_BYTES:,} bytes; this is not a recipe")
    try:
        data = read_yaml(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise FastDraftError(f"{path} is not UTF-8 text") from error
    except ValueError as error:
        raise FastDraftError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(data, dict):
        raise FastDraftError(f"{path}: a recipe is a mapping of keys")
    return build_recipe(data, overrides)


def build_recipe(data: Mapping[str, Any], overrides: Sequence[str] = ()) -> Recipe:
    """Build a recipe from a mapping, ``when`` and overrides included."""
    merged = copy.deepcopy(dict(data))
    when = merged.pop("when", None) or {}
    if not isinstance(when, Mapping):
        raise FastDraftError("when: expected a mapping of machines")
    for machine in when:
        if machine not in ("cpu", "cuda"):
            raise FastDraftError(f"when.{machine}: unknown machine; valid: cpu, cuda")
        if not isinstance(when[machine] or {}, Mapping):
            raise FastDraftError(f"when.{machine}: expected a mapping of key paths to values")
    given = dict(map(split_override, overrides))
    device = given.get("device", merged.get("device", "auto"))
    for path, value in (when.get(resolve_device(device)) or {}).items():
        _assign(merged, str(path), value)
    for path, value in given.items():
        _assign(merged, path, value)
    return Recipe(**change_texts(merged, str))


def resolve_device(device: Any) -> str:
    """Return ``cuda`` or ``cpu`` for ``auto``."""
    if device != "auto":
        return str(device)
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def split_override(word: str) -> tuple[str, Any]:
    """Return the key and the value of ``key=value``, which is YAML."""
    path, equals, text = word.partition("=")
    if not equals or not path:
        raise FastDraftError(f"'{redacted(word)}' is not an override; write key.path=value")
    try:
        return path, read_yaml(text)
    except ValueError as error:
        said = redacted(f"{path}: '{text[:200]}' is not a valid YAML value ({error})")
        raise FastDraftError(said) from error


def _assign(data: dict[str, Any], path: str, value: Any) -> None:
    """Set ``data[a][b][c]`` for the path ``a.b.c``; a number picks an entry of a list."""
    keys = path.split(".")
    holder: Any = data
    key: Any = None
    for depth, name in enumerate(keys):
        where, key = ".".join(keys[: depth + 1]), name
        if isinstance(holder, list):
            if not name.isdecimal() or int(name) >= len(holder):
                entries = f"entries 0 to {len(holder) - 1}" if holder else "no entries"
                raise FastDraftError(f"{where}: the list has {entries}")
            key = int(name)
        elif not isinstance(holder, dict):
            raise FastDraftError(f"{where}: cannot be set, '{keys[depth - 1]}' holds no keys")
        elif holder.get(name) is None:
            holder[name] = {}
        if depth < len(keys) - 1:
            holder = holder[key]
    holder[key] = value
