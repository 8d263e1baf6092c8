"""Sources of training text in a recipe, and their checks before any work."""

from __future__ import annotations

import glob
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field

from fastdraft_hf._config import Number, Section
from fastdraft_hf._errors import FastDraftError


class Source(Section):
    """One source of training text."""

    kind: Literal["generated", "python", "packages", "package_docs", "files", "hub"] = Field(
        "generated",
        description=(
            "generated: a set of stage generate; python: the standard library's source; packages: "
            "Python source of installed packages; package_docs: their descriptions and docstrings; "
            "files: local text, code, jsonl, json or parquet; hub: a dataset on the Hub"
        ),
    )
    name: str = Field(
        "",
        description=(
            "the set's name; a path, folder or glob; a dataset id; packages: a glob of their names"
        ),
    )
    subset: str | None = Field(None, description="hub: the dataset's configuration")
    split: str = Field("train", description="hub: the split")
    column: str = Field(
        "text", description="jsonl, json, parquet, hub: the column that holds the text"
    )
    weight: Number = Field(
        1.0,
        description=(
            "share of the token budget, relative to the other sources; align reads every row"
        ),
    )
    data_dir: str | None = Field(
        None, description="hub: the folder inside the dataset, such as data/python"
    )
    revision: str | None = Field(None, description="hub: branch, tag or commit of the dataset")
    extensions: list[str] = Field(
        [], description="files: only names with these endings, such as [.py, .md]; empty for all"
    )

    def check_values(self) -> None:
        if self.weight <= 0:
            raise FastDraftError(f"weight: must be above 0, got {self.weight}")
        if self.kind in ("generated", "files", "hub") and not self.name:
            raise FastDraftError(f"name: needed for kind {self.kind}")
        if self.extensions and self.kind != "files":
            raise FastDraftError(f"extensions: for kind files only, not {self.kind}")

    def matching_files(self) -> list[Path]:
        """Return the files that ``name`` stands for (a file, a folder or a glob), sorted."""
        folder = Path(self.name)
        if folder.is_dir():  # without what is hidden in it, such as ``.git``
            names = [f"{folder}/{n}" for n in glob.glob("**", root_dir=folder, recursive=True)]
        else:
            names = glob.glob(self.name, recursive=True)
        endings = tuple(self.extensions) or ""
        return sorted(p for p in map(Path, names) if p.name.endswith(endings) and p.is_file())


def check_source(source: Source, path: str, generated_sets: Iterable[str]) -> None:
    """Refuse a source that cannot be read, by names and by the first bytes of local files.

    Args:
        source: what to check.
        path: its key in the recipe, for errors.
        generated_sets: names of the sets that stage generate makes.

    Raises:
        FastDraftError: naming ``path``, or the first file that is not text.
    """
    if source.kind == "generated":
        known = list(generated_sets)
        if source.name not in known:
            raise FastDraftError(
                f"{path}.name: generate has no set '{source.name}'; it has: "
                f"{', '.join(known) or 'none'}"
            )
    elif source.kind == "files":
        from fastdraft_hf.data.documents import check_files

        if not source.matching_files():
            which = f" with {', '.join(source.extensions)}" if source.extensions else ""
            raise FastDraftError(f"{path}.name: no file matches '{source.name}'{which}")
        check_files(source)


def summary_keys(sources: Sequence[Source]) -> list[str]:
    """Return a name for every source; one that occurs again is numbered."""
    keys: list[str] = []
    for source in sources:
        name = source.name or source.kind
        again = sum(key == name or key.startswith(f"{name} #") for key in keys)
        keys.append(f"{name} #{again + 1}" if again else name)
    return keys
