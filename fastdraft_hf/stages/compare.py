"""What a stage's folder says it was made with, to compare with what a recipe says now."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastdraft_hf._config import Section, load
from fastdraft_hf._errors import FastDraftError

CONFIG = "config.yaml"


def deciding(section: Section) -> list[str]:
    """Return the settings that decide what a stage makes, and not only where or how fast."""
    return [name for name in type(section).model_fields if name not in section.RUNTIME_ONLY]


def with_defaults(section: Section, made: dict[str, Any]) -> dict[str, Any]:
    """Return a section's mapping with the defaults written out at every depth.

    One that the section cannot be made of any more stays as it is; it differs in any case.
    """
    try:
        return dict(load(type(section), made).model_dump())
    except FastDraftError:
        return made


def differences(old: Any, new: Any, path: str = "") -> Iterator[str]:
    """Yield what differs between two configurations, as a user reads it."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *(k for k in new if k not in old)]:
            yield from differences(
                old.get(key), new.get(key), f"{path}.{key}" if path else str(key)
            )
    elif old != new:
        yield f"{path}: {old} then, {new} now"


def read_config(folder: Path) -> Any:
    """Return what a stage's folder was made with, ``None`` where it does not say."""
    import yaml

    path = folder / CONFIG
    return yaml.safe_load(path.read_text(encoding="utf-8")) if path.exists() else None
