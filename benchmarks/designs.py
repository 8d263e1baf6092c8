"""The drafts that `fastdraft run` would design for published targets: the table of docs/design.md.

python benchmarks/designs.py [CONFIG.json ...]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from transformers import AutoConfig

from fastdraft_hf._errors import FastDraftError
from fastdraft_hf.draft.config import DesignConfig
from fastdraft_hf.draft.design import LAYERS, design_draft
from fastdraft_hf.draft.families import count_parameters, head_size, read_parameters, text_config

PUBLISHED = Path(__file__).resolve().parents[1] / "tests" / "fixtures" / "targets"


def cell(config: AutoConfig, target: AutoConfig, params: str | None) -> str:
    """Return width, heads, feed-forward, parameters, and the share of the target's read ones."""
    try:
        draft = design_draft(config, DesignConfig(params=params))
    except FastDraftError as error:
        return str(error).split(";")[0]
    share = read_parameters(draft) / read_parameters(target)
    deep = f"{depth} layers: " if (depth := draft.num_hidden_layers) != LAYERS else ""
    return deep + (
        f"{draft.hidden_size:,}, {draft.num_attention_heads} x {head_size(draft)}, "
        f"{draft.intermediate_size:,}: {count_parameters(draft) / 1e6:.1f}M, {share:.4f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("configs", nargs="*", type=Path, default=sorted(PUBLISHED.glob("*.json")))
    print("| target | `params: 50M` | `params: 150M` | by default |\n|---|---|---|---|")
    for path in parser.parse_args().configs:
        given = json.loads(path.read_text(encoding="utf-8"))
        config = AutoConfig.for_model(given.pop("model_type"), **given)
        target = text_config(config)
        cells = [cell(config, target, params) for params in ("50M", "150M", None)]
        print(f"| {path.stem} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
