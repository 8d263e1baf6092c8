"""Sets values in a recipe's text and leaves the rest as it was written, comments included."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastdraft_hf._errors import FastDraftError


def set_values(text: str, changes: Mapping[str, Mapping[str, Any]]) -> str:
    """Return ``text`` with values of sections replaced or added.

    Args:
        text: YAML, a mapping of sections.
        changes: section -> key -> scalar or list of scalars.

    Raises:
        FastDraftError: the text is no mapping, or a section is not written as one key a line.
    """
    for section, values in changes.items():
        for key, value in values.items():
            text = _set(text, section, key, value)
    return text


def _set(text: str, section: str, key: str, value: Any) -> str:
    import yaml

    try:
        document = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise FastDraftError(f"the recipe is no valid YAML ({error})") from error
    words = _words(value)
    if document is None:
        return f"{text}{_gap(text)}{section}:\n  {key}: {words}\n"
    if not isinstance(document, yaml.MappingNode):
        raise FastDraftError("the recipe is no mapping of sections")
    found = _find(document, section)
    if found is None:
        return f"{text}{_gap(text)}{section}:\n  {key}: {words}\n"
    name, block = found
    if isinstance(block, yaml.ScalarNode) and block.value in ("", "null", "~"):
        end = block.end_mark.index
        return f"{text[: name.end_mark.index]}:\n  {key}: {words}{text[end:]}"
    if not isinstance(block, yaml.MappingNode) or not block.value:
        raise FastDraftError(f"{section}: it is no mapping of keys")
    old = _find(block, key)
    if old is not None:
        start, end = old[1].start_mark.index, old[1].end_mark.index
        # A list in block style ends where the next key begins; its last line end stays.
        kept = text[start:end]
        tail = kept[len(kept.rstrip()) :]
        if isinstance(old[1], yaml.SequenceNode) and not old[1].flow_style:
            begin = old[0].end_mark.index
            return f"{text[:begin]}: {words}{tail or chr(10)}{text[end:]}"
        return f"{text[:start]}{words}{tail}{text[end:]}"
    first = block.value[0][0].start_mark
    if block.flow_style:
        return f"{text[: first.index]}{key}: {words}, {text[first.index :]}"
    return f"{text[: first.index]}{key}: {words}\n{' ' * first.column}{text[first.index :]}"


def _find(mapping: Any, key: str) -> tuple[Any, Any] | None:
    for name, value in mapping.value:
        if name.value == key:
            return name, value
    return None


def _words(value: Any) -> str:
    import yaml

    return str(yaml.safe_dump(value, default_flow_style=True)).removesuffix("...\n").strip()


def _gap(text: str) -> str:
    """Return what comes between the end of the text and a new section."""
    if not text.strip():
        return ""
    return "\n" if text.endswith("\n") else "\n\n"
