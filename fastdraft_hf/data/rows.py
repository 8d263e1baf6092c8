"""Rows of any dataset: a local file or folder, or a dataset on the Hub that is streamed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastdraft_hf._errors import FastDraftError

# Suffix of a local file -> its reader in `datasets`.
FORMATS = {
    ".jsonl": "json",
    ".json": "json",
    ".parquet": "parquet",
    ".csv": "csv",
    ".txt": "text",
}


def check_local(dataset: str, where: str) -> None:
    """Raise `FastDraftError` for a local path that does not exist or a file of unknown kind.

    Args:
        dataset: an id on the Hub, a file or a folder.
        where: the setting that names it, for the error (``"tasks.mine.dataset"``).
    """
    path = Path(dataset).expanduser()
    local = path.suffix in FORMATS or dataset.startswith((".", "/", "~"))
    if local and not path.exists():
        raise FastDraftError(f"{where}: there is no file or folder {dataset}")
    if path.is_file() and path.suffix not in FORMATS:
        raise FastDraftError(
            f"{where}: {dataset} has an unknown suffix; known: {', '.join(FORMATS)}"
        )


def read_dataset(
    dataset: str, name: str | None, split: str, revision: str | None, where: str, advice: str
) -> Iterator[dict[str, Any]]:
    """Yield rows. A dataset on the Hub is streamed, so only what is read is fetched.

    Args:
        dataset: an id on the Hub, a file, a folder of files or one written by ``save_to_disk``.
        name: its configuration.
        split: the split.
        revision: branch, tag or commit on the Hub.
        where: the setting that names it, for errors (``"tasks.mine"``).
        advice: what to do if a dataset on the Hub cannot be read.

    Raises:
        FastDraftError: it cannot be read.
    """
    import datasets

    path = Path(dataset).expanduser()
    try:
        if path.is_file():
            stream = datasets.load_dataset(
                FORMATS[path.suffix], data_files={split: str(path)}, split=split, streaming=True
            )
        elif (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists():
            stream = datasets.load_from_disk(str(path))
            if isinstance(stream, dict):
                stream = stream[split]
        else:
            stream = datasets.load_dataset(
                str(path) if path.is_dir() else dataset,
                name,
                split=split,
                revision=revision,
                streaming=True,
            )
        for row in stream:
            yield dict(row)
    # Readers, networks and file systems have many exceptions; all mean that it cannot be read.
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        what = "check the file" if path.exists() else advice
        raise FastDraftError(f"{where}: cannot read {dataset} ({reason}); {what}") from error
