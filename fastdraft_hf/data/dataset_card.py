"""The card of a finished set: a README.md that the Hub and `datasets.load_dataset` read."""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastdraft_hf._atomic import write_text
from fastdraft_hf.data.filters import FILTERS, KEPT, Decode
from fastdraft_hf.data.shards import MANIFEST

README = "README.md"
SAMPLES, SAMPLE_CHARACTERS = 3, 600

_COLUMNS = {
    "index": "number of the row in the set",
    "source": "name of the set",
    "prompt_ids": "token ids the target read, chat template included",
    "completion_ids": "token ids the target wrote, as it wrote them, the stop token included",
    "finish_reason": "`stop`, or `length`: it hit the length limit",
    "temperature": "sampling temperature; 0 is greedy",
    "top_p": "nucleus that was sampled from",
    "sample": "which of several texts of one prompt at one temperature",
    "seed": "seed of the row",
    "prompt_hash": "digest of `prompt_ids`: rows of one prompt share it",
}
_SIZES = ((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"))


@dataclass(frozen=True)
class SetFacts:
    """What a card says that the rows do not.

    Attributes:
        name: of the set.
        about: one sentence, what its prompts and completions are.
        target: name of the model that wrote.
        revision: its revision, when known.
        engine: what ran it.
        license: its license identifier, when known.
        settings: what was asked for, by name.
        prompts: how many prompts were left out, by reason.
        kept: how many rows are kept or left out in training, by reason; empty when not judged.
        language: ISO 639-1 code, when the set was filtered by language.
    """

    name: str
    about: str
    target: str
    revision: str | None
    engine: str
    license: str | None
    settings: Mapping[str, Any]
    prompts: Mapping[str, int] = field(default_factory=dict)
    kept: Mapping[str, int] = field(default_factory=dict)
    language: str | None = None


def write_dataset_card(
    folder: Path, rows: Sequence[dict[str, Any]], facts: SetFacts, decode: Decode
) -> None:
    """Write ``README.md`` into a finished set's folder.

    Args:
        folder: holds the shards.
        rows: of `generated.read_rows`.
        facts: what the rows do not say.
        decode: ids to text, for the samples.
    """
    digest = _digest(folder)
    head, body = _metadata(rows, facts, digest), _body(rows, facts, decode)
    write_text(folder / README, f"---\n{head}\n---\n\n{body}")


def _digest(folder: Path) -> str:
    """Return what tells these rows from any others: a digest of the shards' own."""
    shards = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["shards"]
    return hashlib.sha256(json.dumps(shards, sort_keys=True).encode()).hexdigest()[:16]


def _metadata(rows: Sequence[dict[str, Any]], facts: SetFacts, digest: str) -> str:
    from huggingface_hub import DatasetCardData

    data = DatasetCardData(
        pretty_name=f"{facts.name}, written by {facts.target}",
        license=facts.license,
        language=[facts.language] if facts.language else None,
        tags=["synthetic", "speculative-decoding", "fastdraft"],
        task_categories=["text-generation"],
        size_categories=[next((name for top, name in _SIZES if len(rows) < top), "n>1M")],
        # Only the shards: the other files of the folder are no rows.
        configs=[
            {
                "config_name": "default",
                # `datasets` (5.0) takes a local folder of the same name and metadata for the same
                # dataset and gives the cached rows of the other: no two sets may look alike.
                "description": f"rows {digest}",
                "data_files": [{"split": "train", "path": "part-*.parquet"}],
            }
        ],
    )
    return str(data.to_yaml()).strip()


def _body(rows: Sequence[dict[str, Any]], facts: SetFacts, decode: Decode) -> str:
    revision = f" ({facts.revision})" if facts.revision else ""
    tokens = sum(len(row["completion_ids"]) for row in rows)
    reasons: dict[str, int] = {}
    for row in rows:
        reasons[row["finish_reason"]] = reasons.get(row["finish_reason"], 0) + 1
    ends = ", ".join(f"{count:,} {name}" for name, count in sorted(reasons.items()))
    parts = [
        f"# {facts.name}\n\n{facts.about}",
        f"Written by **{facts.target}**{revision} through {facts.engine}, for training a draft "
        "model that speaks as it does (FastDraft, arXiv 2411.11055). Token ids are kept as they "
        "were generated and were never tokenised from text.",
        f"{len(rows):,} rows, {tokens:,} completion tokens; finished by: {ends or 'none'}.",
        "## Settings\n\n" + _table(("setting", "value"), facts.settings.items()),
    ]
    if facts.prompts:
        head = ("prompts", "count")
        parts.append("## Prompts left out\n\n" + _table(head, facts.prompts.items()))
    if facts.kept:
        parts.append(
            f"## Rows left out in training\n\nNothing is missing here: `{FILTERS}` lists, by "
            "`index`, which rows fastdraft_hf leaves out and why.\n\n"
            + _table(("rows", "count"), facts.kept.items())
        )
    columns = list(rows[0]) if rows else list(_COLUMNS)
    parts.append(
        "## Columns\n\n"
        + _table(("column", "what"), ((f"`{name}`", _COLUMNS.get(name, "")) for name in columns))
    )
    parts.append(_text_back(facts.target))
    parts.append(_samples(rows, decode))
    license = (
        f"The target's license, {facts.license}, holds for what it wrote."
        if facts.license
        else "The target declares no license that was found; its own terms hold for what it wrote."
    )
    source = facts.settings.get("dataset")
    if source:
        license += f" The prompts are from {source}, under the terms of that dataset."
    parts.append(f"## License\n\n{license}")
    return "\n\n".join(parts) + "\n"


def _text_back(target: str) -> str:
    return (
        "## Text\n\n```python\nfrom datasets import load_dataset\n"
        "from transformers import AutoTokenizer\n\n"
        'rows = load_dataset("path/to/this/folder", split="train")\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{target}")\n'
        'print(tokenizer.decode(rows[0]["prompt_ids"] + rows[0]["completion_ids"]))\n```\n\n'
        "Train on the ids, not on this text: tokenising it again may give others than the target "
        "emitted."
    )


def _samples(rows: Sequence[dict[str, Any]], decode: Decode) -> str:
    chosen = random.Random(0).sample(range(len(rows)), min(SAMPLES, len(rows)))
    parts = ["## Samples\n\nDrawn by chance, before any filter."]
    for number in sorted(chosen):
        row = rows[number]
        for what in ("prompt", "completion"):
            text = shortened(decode(row[f"{what}_ids"]), SAMPLE_CHARACTERS)
            head = f"Row {row['index']}, {what}"
            if what == "completion":
                head += f" (temperature {row['temperature']:.2g}, {row['finish_reason']})"
            parts.append(f"{head}:\n\n{fenced(text)}")
    return "\n\n".join(parts)


def shortened(text: str, characters: int) -> str:
    """Return the text, cut with an ellipsis when it is longer than so many characters."""
    return text if len(text) <= characters else text[:characters].rstrip() + " […]"


def fenced(text: str) -> str:
    """Return the text in a code fence that nothing in it can close."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}"


def _table(head: Sequence[str], rows: Any) -> str:
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for row in rows:
        cells = (str(cell).replace("|", "\\|").replace("\n", " ") for cell in row)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def kept_first(counts: Mapping[str, int]) -> dict[str, int]:
    """Return counts with what was kept first, then the reasons from the most frequent one down."""
    others = {name: count for name, count in counts.items() if name != KEPT}
    ordered = sorted(others.items(), key=lambda pair: (-pair[1], pair[0]))
    return {KEPT: counts.get(KEPT, 0), **dict(ordered)}
