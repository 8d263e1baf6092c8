"""``fastdraft schema``: the JSON schema of a recipe, for editors."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser, name: str) -> None:
    parser.description = (
        "Print the JSON schema of a recipe. Save it and name it in the first line of a recipe: "
        "# yaml-language-server: $schema=recipe.schema.json"
    )


def run(args: argparse.Namespace) -> None:
    import json

    from fastdraft_hf.recipe import recipe_schema

    print(json.dumps(recipe_schema(), indent=2))
