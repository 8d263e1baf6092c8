"""Train a draft in one process or many; `accelerate launch` and `torchrun` start this file.

    accelerate launch --config_file recipes/accelerate/multi_gpu.yaml \
        recipes/train.py --config my.yaml [--learning_rate 5e-4 ...]

Checkpoints go to `output_dir`, which every machine must see, and the draft with its tokenizer to
`output_dir/model`. Started again with the same settings, it goes on from the last whole
checkpoint. Input that cannot be used: one line, exit status 2, and nothing was written.
"""

from __future__ import annotations

import dataclasses
import glob
import itertools
import json
import os
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import yaml
from accelerate import PartialState
from transformers import AutoTokenizer
from transformers.utils import logging
from trl import ModelConfig, TrlParser, get_peft_config

from fastdraft_hf._errors import FastDraftError
from fastdraft_hf._redact import redacted
from fastdraft_hf.data.columns import column_names
from fastdraft_hf.data.decontaminate import Decontaminator
from fastdraft_hf.data.filters import FILTERS
from fastdraft_hf.data.parts import PARTS, has_parts
from fastdraft_hf.train.checkpoints import AlreadyTrainedError, StopAtTheEnd, shared_checkpoint
from fastdraft_hf.train.checks import mean_length
from fastdraft_hf.train.trainer import DraftDistillationConfig, DraftDistillationTrainer

# Documents of each dataset whose mean length decides how often it is drawn from.
MEASURED_DOCUMENTS = 200


@dataclass
class ScriptArguments:
    """What is read, and whether to go on."""

    dataset: str = field(
        metadata={
            "help": "Training data: a folder of save_to_disk, a parquet or jsonl file or glob, or "
            "a dataset of the Hub, or a folder of `fastdraft tokenize`; rows of input_ids and "
            "labels, with the target's distribution if it is stored, rows of `fastdraft generate`, "
            "a run's folder `generate` (the rows its filters keep), or whatever TRL's SFTTrainer "
            "prepares."
        }
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Its configuration."})
    dataset_split: str = field(default="train", metadata={"help": "The split to train on."})
    streaming: bool = field(
        default=False, metadata={"help": "Read it while training instead of before."}
    )
    shuffle_buffer: int = field(
        default=0, metadata={"help": "Rows to shuffle a stream in; 0 leaves it in its order."}
    )
    mix_dataset: str | None = field(
        default=None, metadata={"help": "A second dataset of text, read in turn with the first."}
    )
    mix_dataset_config: str | None = field(default=None, metadata={"help": "Its configuration."})
    mix_text_field: str = field(default="text", metadata={"help": "Its column of text."})
    mix_share: float = field(
        default=0.5, metadata={"help": "Its share of the text, by characters; above 0, below 1."}
    )
    held_out_tasks: list[str] = field(
        default_factory=list,
        metadata={"help": "Task sets whose text is left out: humaneval, ifbench, cnn_dailymail, …"},
    )
    eval_split: str | None = field(
        default=None, metadata={"help": "Split of the same data to evaluate on."}
    )
    eval_size: int = field(
        default=0, metadata={"help": "Rows of the training split to hold out instead."}
    )
    generated_sets: list[str] = field(
        default_factory=list,
        metadata={"help": "Sets of a run's folder `generate`; by default every set of answers."},
    )
    resume: bool = field(
        default=True, metadata={"help": "Go on from the last whole checkpoint in output_dir."}
    )


class Parser(TrlParser):  # type: ignore[misc]
    """TRL's, without its page of usage before the line that says what is wrong."""

    def error(self, message: str) -> Any:
        raise ValueError(message)


def open_dataset(script: ScriptArguments, split: str) -> Any:
    """Return a split, streamed or not."""
    path = Path(script.dataset)
    if script.generated_sets or list(path.glob(f"*/{PARTS}")):
        return open_generated(path, script.generated_sets)
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        found = datasets.load_from_disk(str(path))
        if isinstance(found, datasets.DatasetDict):
            if split not in found:
                raise ValueError(f"dataset {path}: no split {split}, only {', '.join(found)}")
            found = found[split]
        shards = min(64, len(found))
        return found.to_iterable_dataset(num_shards=shards) if script.streaming else found
    kinds = {"parquet": "parquet", "jsonl": "json", "json": "json"}
    kind = kinds.get(path.name.removesuffix(".gz").removesuffix(".zst").rpartition(".")[2])
    if kind is None and path.exists():
        raise ValueError(f"dataset {path}: no dataset of save_to_disk and no parquet or jsonl")
    options = {"split": split, "streaming": script.streaming}
    if kind and "://" not in script.dataset and not glob.glob(script.dataset):
        raise ValueError(f"dataset: no file is called {script.dataset}")
    if kind is None:
        return datasets.load_dataset(script.dataset, script.dataset_config, **options)
    return datasets.load_dataset(kind, data_files={split: script.dataset}, **options)


def open_generated(folder: Path, wanted: list[str]) -> Any:
    """Return the rows of a run's generated sets that their filters keep, as stage align does.

    Magpie's instructions are prompts of another set and no answers, so only a wish reads them.
    """
    finished = sorted(path.name for path in folder.iterdir() if has_parts(path))
    answers = [n for n in finished if n.removesuffix("-instructions") not in {*finished} - {n}]
    parts = []
    for name in wanted or answers:
        if name not in finished:
            raise ValueError(f"generated_sets: {folder} has no finished set {name}")
        files = str(folder / name / "part-*.parquet")
        rows = datasets.load_dataset("parquet", data_files={"train": files}, split="train")
        filters = folder / name / FILTERS
        if filters.exists():
            dropped = json.loads(filters.read_text(encoding="utf-8"))["dropped"]
            left_out = {index for indices in dropped.values() for index in indices}
            kept = [i for i, index in enumerate(rows["index"]) if index not in left_out]
            rows = rows.select(kept)
        parts.append(rows.select_columns(["prompt_ids", "completion_ids"]))
    return datasets.concatenate_datasets(parts)


def with_labels(dataset: Any) -> Any:
    """Return rows of `fastdraft generate` as ids and labels; others as they are."""
    if "completion_ids" not in (names := column_names(dataset)):
        return dataset

    def joined(row: dict[str, Any]) -> dict[str, Any]:
        prompt, completion = row["prompt_ids"], row["completion_ids"]
        return {"input_ids": prompt + completion, "labels": [-100] * len(prompt) + completion}

    return dataset.map(joined, remove_columns=names).filter(lambda row: len(row["input_ids"]) > 1)


def mixed(script: ScriptArguments, rows: Any, column: str, seed: int) -> Any:
    """Return the rows' text with that of the second dataset, by the share of its characters.

    Documents are drawn, and one of code is longer than one of prose: the chances are divided by
    the mean length of the first documents of each.
    """
    if not 0 < script.mix_share < 1:
        raise ValueError(f"mix_share: above 0 and below 1, not {script.mix_share:g}")
    second = dataclasses.replace(
        script, dataset=script.mix_dataset, dataset_config=script.mix_dataset_config
    )
    other = open_dataset(second, script.dataset_split)
    parts, chances = [], []
    for part, name, share in (
        (rows, column, 1 - script.mix_share),
        (other, script.mix_text_field, script.mix_share),
    ):
        if name not in (names := column_names(part)):
            raise ValueError(f"the text's column '{name}' is missing; there is: {', '.join(names)}")
        part = part.select_columns([name])
        parts.append(part if name == "text" else part.rename_column(name, "text"))
        lengths = [len(row["text"]) for row in itertools.islice(parts[-1], MEASURED_DOCUMENTS)]
        chances.append(share * len(lengths) / max(1, sum(lengths)))
    return datasets.interleave_datasets(
        parts,
        probabilities=[chance / sum(chances) for chance in chances],
        seed=seed,
        stopping_strategy="all_exhausted",
    )


def without_held_out(rows: Any, tasks: list[str], column: str, tokenizer: Any) -> Any:
    """Return the rows that share no 13 words in a row with a held-out prompt."""
    if not tasks:
        return rows
    names = column_names(rows)
    overlaps = Decontaminator.of_task_sets(tasks).overlaps
    if "completion_ids" in names:
        return rows.filter(
            lambda row: not overlaps(tokenizer.decode(row["prompt_ids"] + row["completion_ids"]))
        )
    if column not in names:
        raise ValueError(
            f"held_out_tasks: rows have neither completion_ids nor a column '{column}' to look at"
        )
    return rows.filter(lambda row: not overlaps(row[column]))


def train_and_eval(
    script: ScriptArguments, seed: int, column: str = "text", tokenizer: Any = None
) -> tuple[Any, Any]:
    """Return the rows to train on and those held out, if any."""
    rows = open_dataset(script, script.dataset_split)
    if script.mix_dataset is not None:
        rows, column = mixed(script, rows, column, seed), "text"
    rows = with_labels(without_held_out(rows, script.held_out_tasks, column, tokenizer))
    if script.eval_split and script.eval_size:
        raise ValueError("eval_split and eval_size: give one of them")
    held_out = with_labels(open_dataset(script, script.eval_split)) if script.eval_split else None
    if script.eval_size and script.streaming:
        rows, held_out = rows.skip(script.eval_size), rows.take(script.eval_size)
    elif script.eval_size:
        halves = rows.train_test_split(test_size=script.eval_size, seed=seed)
        rows, held_out = halves["train"], halves["test"]
    if script.streaming and script.shuffle_buffer:
        rows = rows.shuffle(seed=seed, buffer_size=script.shuffle_buffer)
    return rows, held_out


def build(words: list[str]) -> tuple[ScriptArguments, DraftDistillationTrainer]:
    """Return the trainer; whatever is wrong with the input is raised here."""
    parser = Parser((ScriptArguments, DraftDistillationConfig, ModelConfig), description=__doc__)
    script, args, model = parser.parse_args_and_config(words)
    if not script.resume and any(Path(args.output_dir).glob("checkpoint-*")):
        raise ValueError(f"{args.output_dir} has checkpoints; resume, or give another output_dir")
    draft = model.model_name_or_path
    if draft is None or (draft.startswith(("/", ".")) and not Path(draft).exists()):
        raise ValueError(f"model_name_or_path: there is no {draft or 'draft to train'}")
    if model.load_in_4bit or model.load_in_8bit:
        raise ValueError("load_in_4bit, load_in_8bit: a draft is trained as it is, not quantised")
    model.lora_target_modules = model.lora_target_modules or "all-linear"
    peft_config = get_peft_config(model)
    args.model_init_kwargs = {
        "revision": model.model_revision,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
        **(args.model_init_kwargs or {}),
    }
    tokenizer = AutoTokenizer.from_pretrained(draft, revision=model.model_revision)
    rows, held_out = train_and_eval(script, args.seed, args.dataset_text_field, tokenizer)
    if script.mix_dataset is not None:
        args.dataset_text_field = "text"
    return script, DraftDistillationTrainer(
        model=draft,
        args=args,
        train_dataset=rows,
        eval_dataset=held_out,
        processing_class=tokenizer,
        peft_config=peft_config,
        callbacks=[StopAtTheEnd()],
    )


def save(trainer: DraftDistillationTrainer, folder: Path) -> None:
    """Write the draft and its tokenizer, whole or not at all; adapters are merged."""
    state, partial = PartialState(), folder / ".model.partial"
    trained = partial / "adapter" if hasattr(trainer.model, "peft_config") else partial
    trainer.save_model(str(trained))  # every process takes part where the draft is cut up
    state.wait_for_everyone()
    if state.is_main_process:
        if trained != partial:
            from peft import AutoPeftModelForCausalLM

            adapted = AutoPeftModelForCausalLM.from_pretrained(trained, dtype="float32")
            adapted.merge_and_unload().save_pretrained(partial)
            trainer.processing_class.save_pretrained(partial)
        shutil.rmtree(folder / "model", ignore_errors=True)
        os.replace(partial, folder / "model")
    state.wait_for_everyone()


def main(words: list[str]) -> int:
    # torchrun gives every process the same words; one of them speaks.
    speaks = os.environ.get("RANK", "0") == "0"

    def say(line: str) -> None:
        if speaks:
            print(redacted(line), file=sys.stderr, flush=True)

    datasets.disable_progress_bars()
    logging.disable_progress_bar()
    try:
        script, trainer = build(words)
    except (FastDraftError, ValueError, TypeError, OSError, ImportError, yaml.YAMLError) as error:
        say(f"train.py: {' '.join(str(error).split())}")
        return 2
    args = trainer.args
    checkpoint: Any = args.resume_from_checkpoint
    if checkpoint is None and script.resume:
        checkpoint = shared_checkpoint(Path(args.output_dir))
    rows = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    say(
        f"{rows} rows a step ({args.train_batch_size} x {args.gradient_accumulation_steps} "
        f"accumulated x {args.world_size} processes), about "
        f"{rows * mean_length(trainer.train_dataset):,.0f} tokens; "
        f"{f'going on from {checkpoint}' if checkpoint else 'from the start'}"
    )
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except AlreadyTrainedError:
        say("the last checkpoint is the end of the run")
    except FastDraftError as error:
        say(f"train.py: {error}")
        return 1
    save(trainer, Path(args.output_dir))
    tokens = trainer.state.num_input_tokens_seen
    say(f"{args.output_dir}/model: {trainer.state.global_step} steps, {tokens:,} tokens")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
