"""The model card of `DraftDistillationTrainer`, and the files that it pushes."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastdraft_hf._card import CARD, DRAFT_FILES, check_texts, draft_files, fill_card
from fastdraft_hf._errors import FastDraftError

if TYPE_CHECKING:
    from huggingface_hub import ModelCard

    from fastdraft_hf.target.resolve import Target
    from fastdraft_hf.train.trainer import DraftDistillationTrainer


def trainer_card(
    trainer: DraftDistillationTrainer,
    *,
    model_name: str | None,
    dataset_name: str | None,
    tags: list[str],
    target: str | None,
) -> ModelCard:
    """Return the card of a draft that is not measured yet; ``target`` is the teacher by default."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    teacher, own = trainer.teacher_model, model.num_parameters()
    if target is None and teacher is not None:
        target = teacher.config.name_or_path
    target = target or trainer.args.teacher_model_name_or_path
    found = _describe(target) if target else None
    seconds = sum(entry.get("train_runtime", 0) for entry in trainer.state.log_history)
    device = trainer.accelerator.device
    kind = f"{device.type} ({platform.machine()})"
    if device.type == "cuda":
        import torch

        kind = torch.cuda.get_device_name(device)
    steps = f"{trainer.state.global_step:,} steps."
    return fill_card(
        model_name=model_name or Path(str(trainer.args.output_dir)).name,
        target_name=found.name if found else "its target",
        target_revision=found.revision if found else None,
        draft_location=trainer.hub_model_id or str(trainer.args.output_dir),
        license=found.license if found else None,
        datasets=[dataset_name] if dataset_name else [],
        tags=tags,
        num_assistant_tokens=model.generation_config.num_assistant_tokens or 3,
        draft_parameters=f"{own:,}",
        target_parameters=f"{teacher.num_parameters():,}" if teacher is not None else "more",
        size_ratio=f"{teacher.num_parameters() / own:.1f}" if teacher is not None else None,
        stages_table=f"{int(trainer.state.num_input_tokens_seen):,} tokens in {steps}",
        objective=", ".join(f"{w:g} {name}" for name, w in trainer.objective.weights.items()),
        machine=f"{trainer.accelerator.num_processes} x {kind}",
        cost=f"Training time {seconds / 3600:.2f} hours." if seconds else "",
        limits="",
    )


def _describe(name: str) -> Target:
    """Describe the target without contacting the Hub."""
    from fastdraft_hf.target.resolve import Target, resolve_target

    if not Path(name).is_dir():
        return Target(Path(name), name)
    try:
        return resolve_target(str(Path(name).resolve()))
    except FastDraftError:
        return Target(Path(name), Path(name).resolve().name)


def push_folder(
    trainer: DraftDistillationTrainer, message: str, token: str | None, revision: str | None
) -> Any:
    """Push the draft in the output folder, and nothing else of it, in one commit."""
    from huggingface_hub import HfApi

    folder = Path(str(trainer.args.output_dir))
    # An adapter that is not merged has its own config.
    files = draft_files(folder, [*DRAFT_FILES, "adapter_config.json", CARD])
    check_texts(files, token)
    return HfApi(library_name="fastdraft_hf").upload_folder(
        repo_id=str(trainer.hub_model_id),
        folder_path=str(folder),
        commit_message=message,
        token=token,
        revision=revision,
        allow_patterns=list(files),
    )
