"""What `DraftDistillationTrainer` writes for, and sends to, the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastdraft_hf._card import DRAFT_FILES, fill_card

if TYPE_CHECKING:
    from huggingface_hub import ModelCard

    from fastdraft_hf.target.resolve import Target
    from fastdraft_hf.train.trainer import DraftDistillationTrainer

# Beside those of a draft: an adapter that is not merged.
PUSHED_FILES = [*DRAFT_FILES, "adapter_config.json", "README.md"]
# Patterns cross slashes, and checkpoints hold weights as well.
NOT_PUSHED = ["checkpoint-*", "_*", "*/*.safetensors"]

# As TRL's trainers say which paper they follow.
PAPER = {
    "title": "FastDraft: How to Train Your Draft",
    "id": "2411.11055",
    # docstyle-ignore
    "citation": (
        "@inproceedings{zafrir2025fastdraft,\n"
        "    title     = {{FastDraft: How to Train Your Draft}},\n"
        "    author    = {Ofir Zafrir and Igor Margulis and Dorin Shteyman and Shira Guskin and "
        "Guy Boudoukh},\n"
        "    year      = 2025,\n"
        "    booktitle = {Findings of the Association for Computational Linguistics: ACL 2025},\n"
        "    eprint    = {arXiv:2411.11055}\n"
        "}"
    ),
}


def trainer_card(
    trainer: DraftDistillationTrainer,
    *,
    model_name: str | None,
    dataset_name: str | None,
    tags: list[str],
    target: str | None,
) -> ModelCard:
    """Return the card of a draft as far as the trainer knows it: nothing of it is measured yet.

    Args:
        trainer: the trainer.
        model_name: the heading.
        dataset_name: id of the dataset.
        tags: further tags.
        target: the target's id, for a run whose target's distribution was stored.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    found = _target(trainer, target)
    gamma = model.generation_config.num_assistant_tokens or 3
    seen = int(trainer.state.num_input_tokens_seen)
    seconds = sum(e.get("train_runtime", 0) for e in trainer.state.log_history)
    sizes = [trainer.target_model.num_parameters()] if trainer.target_model is not None else []
    license = found.license if found else None
    return fill_card(
        model_name=model_name or Path(str(trainer.args.output_dir)).name,
        target_name=found.name if found else "its target",
        target_revision=found.revision if found else None,
        draft_location=trainer.hub_model_id or str(trainer.args.output_dir),
        license=license,
        datasets=[dataset_name] if dataset_name else None,
        tags=tags,
        draft_parameters=f"{model.num_parameters():,}",
        target_parameters=f"{sizes[0]:,}" if sizes else "own",
        size_ratio=f"{sizes[0] / model.num_parameters():.1f}" if sizes else None,
        num_assistant_tokens=gamma,
        stages_table=f"{seen:,} tokens in {trainer.state.global_step:,} steps.",
        objective=", ".join(f"{w:g} {name}" for name, w in trainer.objective.weights.items()),
        machine=_machine(trainer),
        cost=f"Training time {seconds / 3600:.2f} hours." if seconds else "",
        limits="",
    )


def _target(trainer: DraftDistillationTrainer, name: str | None) -> Target | None:
    """Describe the target without asking the Hub for it."""
    from fastdraft_hf._errors import FastDraftError
    from fastdraft_hf.target.resolve import Target, resolve_target

    if name is None and trainer.target_model is not None:
        name = trainer.target_model.config.name_or_path
    name = name or trainer.args.teacher_model_name_or_path
    if not name:
        return None
    if not Path(name).is_dir():
        return Target(Path(name), name)
    try:
        return resolve_target(str(Path(name).resolve()))
    except FastDraftError:
        return Target(Path(name), Path(name).resolve().name)


def _machine(trainer: DraftDistillationTrainer) -> str:
    import platform

    import torch

    device = trainer.accelerator.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    count = trainer.accelerator.num_processes
    name = name or f"{device.type} ({platform.machine()})"
    return f"{count} x {name}" if count > 1 else name


def push_folder(
    trainer: DraftDistillationTrainer, message: str, token: str | None, revision: str | None
) -> Any:
    """Send the output folder's draft, and nothing else of it, in one commit."""
    from huggingface_hub import HfApi

    return HfApi(library_name="fastdraft_hf").upload_folder(
        repo_id=str(trainer.hub_model_id),
        folder_path=str(trainer.args.output_dir),
        commit_message=message,
        token=token,
        revision=revision,
        allow_patterns=PUSHED_FILES,
        ignore_patterns=NOT_PUSHED,
    )
