"""A settings dataclass as options of a command."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any, TypeVar

T = TypeVar("T")


def add_fields(parser: argparse.ArgumentParser, section: Any, title: str) -> None:
    """Add an option for every setting of a dataclass; values are YAML."""
    group = parser.add_argument_group(title, "lists and mappings as YAML")
    for field in dataclasses.fields(section):
        default = _default(field)
        text = str(field.metadata.get("help", ""))
        if default is not None and default != {} and default != []:
            text += f" (default: {default})"
        # A switch may be given without its value.
        switch: dict[str, Any] = {"nargs": "?", "const": "true"} if default is False else {}
        group.add_argument(
            f"--{field.name.replace('_', '-')}",
            dest=f"field_{field.name}",
            metavar="VALUE",
            help=text.replace("%", "%%"),
            **switch,
        )


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None


def read_fields(args: argparse.Namespace, section: type[T]) -> T:
    """Return the dataclass of the options that were given.

    Raises:
        FastDraftError: a value that is no YAML, of the wrong type, or refused by the dataclass.
    """
    import yaml

    from fastdraft_hf._errors import FastDraftError
    from fastdraft_hf._schema import load

    values = {}
    for key, text in vars(args).items():
        if not key.startswith("field_") or text is None:
            continue
        name = key.removeprefix("field_")
        try:
            values[name] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise FastDraftError(f"{name}: '{text}' is no valid YAML value") from error
    return load(section, values)
