"""Mixtures with a name: what ``{preset: …}`` in a recipe's sources stands for.

The shares of ``paper-cp`` are the paper's (5 billion tokens of code to 2.5 billion of text).
A preset is data: its entries are ordinary sources, written out in the run's resolved recipe.
"""

from __future__ import annotations

from typing import Any

_FINEWEB = {
    "kind": "hub",
    "name": "HuggingFaceFW/fineweb",
    "subset": "sample-10BT",
    "column": "text",
}
_FINEWEB_EDU = {**_FINEWEB, "name": "HuggingFaceFW/fineweb-edu"}
# Gated: its terms have to be accepted on the Hub, and a token be at hand (`hf auth login`). Without
# a directory it would be read language by language, from the alphabet's start.
_THE_STACK = {
    "kind": "hub",
    "name": "bigcode/the-stack-dedup",
    "data_dir": "data/python",
    "column": "content",
}
# Not gated: Python files of GitHub, deduplicated and filtered.
_CODEPARROT = {"kind": "hub", "name": "codeparrot/codeparrot-clean", "column": "content"}

PRESETS: dict[str, list[dict[str, Any]]] = {
    "fineweb": [_FINEWEB],
    "fineweb-edu": [_FINEWEB_EDU],
    "the-stack": [_THE_STACK],
    "codeparrot": [_CODEPARROT],
    # The paper's PT and CP.
    "paper-pt": [_FINEWEB],
    "paper-cp": [{**_THE_STACK, "weight": 5}, {**_FINEWEB, "weight": 2.5}],
    "paper-cp-open": [{**_CODEPARROT, "weight": 5}, {**_FINEWEB, "weight": 2.5}],
    # From what every machine has that can run this: no download.
    "offline-pt": [{"kind": "package_docs"}],
    "offline-cp": [
        {"kind": "python", "weight": 2},
        {"kind": "packages", "weight": 3},
        {"kind": "package_docs", "weight": 2.5},
    ],
}
