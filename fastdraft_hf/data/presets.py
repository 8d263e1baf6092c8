"""Named mixtures of sources, for ``{preset: …}`` in a recipe.

The shares of ``paper-cp`` are the paper's (5 billion tokens of code to 2.5 billion of text). The
entries are ordinary sources, listed in the run's ``config.yaml``.
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
# Gated: accept its terms on the Hub and log in with `hf auth login`. Without a folder it would be
# read language by language, in the order of the alphabet.
_THE_STACK = {
    "kind": "hub",
    "name": "bigcode/the-stack-dedup",
    "data_dir": "data/python",
    "column": "content",
}
# Not gated: Python files from GitHub, deduplicated and filtered.
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
    # Without a download: from what is installed.
    "offline-pt": [{"kind": "package_docs"}],
    "offline-cp": [
        {"kind": "python", "weight": 2},
        {"kind": "packages", "weight": 3},
        {"kind": "package_docs", "weight": 2.5},
    ],
}
