"""A design beside its target, as a table."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastdraft_hf.draft.families import head_groups, head_size, text_config
from fastdraft_hf.draft.sizes import parameters_by_part

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def design_rows(target: PretrainedConfig, draft: PretrainedConfig) -> list[dict[str, str]]:
    """Return widths and parameters of a draft and its target, a dictionary a row.

    The target's parameters are all it has, those of other towers and experts included.
    """
    wide, parts = text_config(target), parameters_by_part(target)
    narrow, own = draft, parameters_by_part(draft)
    rows = []

    def row(what: str, ours: Any, theirs: Any, share: str = "") -> None:
        cells = [f"{v:,}" if isinstance(v, int) else str(v) for v in (ours, theirs)]
        rows.append({"": what, "draft": cells[0], "target": cells[1], "share": share})

    row("family", narrow.model_type, target.model_type)
    for what, field in (
        ("layers", "num_hidden_layers"),
        ("width", "hidden_size"),
        ("feed-forward width", "intermediate_size"),
        ("vocabulary", "vocab_size"),
    ):
        row(what, getattr(narrow, field), getattr(wide, field))
    row("heads", _heads(narrow), _heads(wide))
    row("parameters", "", "")
    for part in dict.fromkeys([*own, *parts]):
        count, whole = own.get(part, 0), parts.get(part, 0)
        if part == "head":  # a tied one has no weights of its own
            row("  head", count or "tied", whole or "tied", f"{count / sum(own.values()):.1%}")
        elif count or whole:
            row(f"  {part}", count, whole, f"{count / sum(own.values()):.1%}")
    ours, theirs = sum(own.values()), sum(parts.values())
    row("  all", ours, theirs, f"1/{theirs / ours:.1f}")
    row("bytes in bf16", _size(2 * ours), _size(2 * theirs))
    return rows


def _heads(config: Any) -> str:
    groups = head_groups(config)
    heads = config.num_attention_heads
    grouped = f", {groups} key-value" if groups != heads else ""
    return f"{heads} of {head_size(config)}{grouped}"


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
