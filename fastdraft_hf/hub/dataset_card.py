"""The repository of what the target wrote: the sets' shards and a card."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from fastdraft_hf.hub.files import CARD, RepoFile
from fastdraft_hf.hub.metadata import check_metadata

_TAGS = ["fastdraft", "synthetic", "speculative-decoding"]


def dataset_files(
    sets: Sequence[Path], *, target: str, base_model: str | None, license: str | None
) -> list[RepoFile]:
    """Return the files of a dataset's repository, a folder a set.

    Args:
        sets: the sets' folders, as stage generate writes them. A ``README.md`` in one is what its
            section of the card says.
        target: the model that wrote them.
        base_model: its id on the Hub, if it is another.
        license: the license of what it wrote.
    """
    files = []
    for folder in sets:
        for file in sorted(folder.iterdir()):
            if file.suffix == ".parquet" or file.name == "manifest.json":
                files.append(RepoFile(f"{folder.name}/{file.name}", file))
    card = _card(sets, base_model or target, license)
    return [RepoFile(CARD, card.encode()), *files]


def _card(sets: Sequence[Path], target: str, license: str | None) -> str:
    from huggingface_hub import DatasetCard, DatasetCardData

    data = DatasetCardData(
        license=license,
        task_categories=["text-generation"],
        tags=_TAGS,
        pretty_name=f"Text written by {target.split('/')[-1]}",
        configs=[{"config_name": s.name, "data_files": f"{s.name}/part-*.parquet"} for s in sets],
    )
    check_metadata(data.to_dict())
    link = f"[{target}](https://huggingface.co/{target})" if "/" in target else target
    parts = [
        f"# {data.pretty_name}",
        f"What {link} wrote itself, for training a draft model for it with "
        "[fastdraft_hf](https://pypi.org/project/fastdraft-hf/) (FastDraft, arXiv 2411.11055). "
        "Prompts and completions are token ids of its tokenizer. Text that shares 13 words in a "
        "row with an evaluation prompt is left out when a draft is trained.",
    ]
    for folder in sets:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        parts.append(f"## {folder.name}")
        tokens = manifest.get("completion_tokens", 0)
        parts.append(f"{manifest['rows']:,} rows, {tokens:,} completion tokens.")
        written = folder / CARD
        if written.is_file():
            parts.append(DatasetCard.load(written, ignore_metadata_errors=True).text.strip())
    if license is None:
        parts.append("The license follows the target's.")
    return f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n"
