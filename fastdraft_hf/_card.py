"""What a draft's repository holds, and its card's template: for the trainer and for `hub`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCard

# A checkpoint and its tokenizer. Weights are safetensors only: a pickle runs code when it is read.
DRAFT_FILES = (
    "*.safetensors",
    "*.safetensors.index.json",
    "config.json",
    "generation_config.json",
    "tokenizer*.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "reduced_vocabulary.json",
    "LICENSE*",
    "NOTICE*",
    "custom_generate/generate.py",
    "custom_generate/requirements.txt",
)
TAGS = ["fastdraft", "speculative-decoding", "draft-model", "assisted-generation"]


def template_path() -> Path:
    """Return the card's template: packed in ``hub/``, or in the checkout's model_cards/."""
    packed = Path(__file__).parent / "hub" / "template.md"
    if packed.exists():
        return packed
    return Path(__file__).resolve().parents[1] / "model_cards" / "template.md"


def fill_card(
    *,
    model_name: str,
    target_name: str,
    draft_location: str,
    license: str | None = None,
    base_model: str | None = None,
    datasets: list[str] | None = None,
    language: list[str] | None = None,
    tags: list[str] | None = None,
    eval_results: list[EvalResult] | None = None,
    **fields: Any,
) -> ModelCard:
    """Fill the template; a part whose fields are not given is left out of the card.

    Args:
        model_name: the heading.
        target_name: the target's model id, or the name of its folder.
        draft_location: what the snippets load the draft from.
        license: license identifier; ``other`` is given a name and a link to the target's page.
        base_model: the target's id on the Hub; by default ``target_name``.
        datasets: ids of the datasets it was trained on.
        language: language codes.
        tags: further tags.
        eval_results: the model index.
        **fields: what the template reads besides.
    """
    from huggingface_hub import ModelCard, ModelCardData

    base_model = base_model or target_name
    # A folder's name is no id: the Hub would link to another model, or to none.
    is_id = re.fullmatch(r"[\w.-]+/[\w.-]+", base_model) is not None
    # No `base_model_relation`: the Hub knows finetune, adapter, quantized and merge, and a draft is
    # none of them.
    data = ModelCardData(
        model_name=model_name,
        base_model=base_model if is_id else None,
        license=license,
        datasets=datasets or None,
        language=language or None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=list(dict.fromkeys([*TAGS, *(tags or [])])),
        eval_results=eval_results or None,
    )
    if license == "other":
        data.license_name = f"{base_model.split('/')[-1].lower()}-license"
        data.license_link = f"https://huggingface.co/{base_model}"
    return ModelCard.from_template(
        data,
        template_path=str(template_path()),
        model_name=model_name,
        target_name=base_model,
        draft_location=draft_location,
        license_line=f"{license}." if license else "Follows the target's license.",
        **fields,
    )
