"""``fastdraft schema [SECTION]``: the settings of a recipe."""

from __future__ import annotations

import argparse
import textwrap
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastdraft_hf._config import Section


def add_arguments(parser: argparse.ArgumentParser, name: str) -> None:
    parser.description = (
        "Print the settings of a section, or the JSON schema of a recipe for editors. Save the "
        "schema and name it in the first line of a recipe: "
        "# yaml-language-server: $schema=recipe.schema.json"
    )
    parser.add_argument("section", nargs="?", metavar="SECTION", help="such as design or align")


def run(args: argparse.Namespace) -> None:
    import json

    from fastdraft_hf._errors import FastDraftError, nearest
    from fastdraft_hf.recipe import recipe_schema, sections

    if args.section is None:
        print(json.dumps(recipe_schema(), indent=2))
        return
    found = sections()
    if args.section not in found:
        hint = nearest(args.section, found)
        raise FastDraftError(
            f"schema: no section '{args.section}'{hint}; sections: {', '.join(found)}"
        )
    print(settings_text(found[args.section]))


def settings_text(section: type[Section]) -> str:
    """Return a section's settings, their defaults and descriptions, for a terminal."""
    lines = ["settings:"]
    for name, field in section.model_fields.items():
        text = field.description or ""
        default = field.get_default(call_default_factory=True)
        if not field.is_required() and default not in (None, {}, []):
            text += f" (default: {default})"
        lines += textwrap.wrap(text, 98, initial_indent=f"  {name:<28}", subsequent_indent=" " * 30)
    return "\n".join(lines)
