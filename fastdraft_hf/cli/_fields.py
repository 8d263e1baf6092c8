"""A section's settings as options of a command."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from fastdraft_hf._config import Section

    T = TypeVar("T", bound=Section)


def add_fields(parser: argparse.ArgumentParser, section: type[Section], title: str) -> None:
    """Add an option for every setting of a section; values are YAML."""
    group = parser.add_argument_group(title, "lists and mappings as YAML")
    for name, field in section.model_fields.items():
        default = field.get_default(call_default_factory=True)
        text = field.description or ""
        if not field.is_required() and default is not None and default != {} and default != []:
            text += f" (default: {default})"
        # A switch may be given without its value.
        switch: dict[str, Any] = {"nargs": "?", "const": "true"} if default is False else {}
        group.add_argument(
            f"--{name.replace('_', '-')}",
            dest=f"field_{name}",
            metavar="VALUE",
            help=text.replace("%", "%%"),
            **switch,
        )


def read_fields(args: argparse.Namespace, section: type[T]) -> T:
    """Return the section with the options that were given.

    Raises:
        FastDraftError: a value that is not YAML, has the wrong type, or is refused by the section.
    """
    import yaml

    from fastdraft_hf._errors import FastDraftError

    values = {}
    for key, text in vars(args).items():
        if not key.startswith("field_") or text is None:
            continue
        name = key.removeprefix("field_")
        try:
            values[name] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise FastDraftError(f"{name}: '{text}' is not a valid YAML value") from error
    return section(**values)
