"""Two processes under torchrun, which train all that tests compare with one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import scale_out

from fastdraft_hf.data.corpus import open_corpus
from fastdraft_hf.data.sources import Source

BLOCK = 8


@dataclass(frozen=True)
class TwoProcesses:
    """Where they left what they found.

    Attributes:
        models: what the scenarios of `scale_out` train, ``tied`` and ``untied``, and ``target``.
        scenarios: ``NAME.RANK.json`` of every scenario, and its final weights.
        corpus: the folder of `corpus_two`: written blocks and what each process read.
        source: the corpus's text, 60 documents of a block each.
    """

    models: Path
    scenarios: Path
    corpus: Path
    source: Source


def launch(folder: Path, tiny_model: Callable[..., Any], tokenizer: Any) -> TwoProcesses:
    """Prepare both and start torchrun; a hang fails by its time limit."""
    models, scenarios, corpus = folder / "models", folder / "scenarios", folder / "corpus"
    scenarios.mkdir(parents=True)
    tiny_model(seed=1).save_pretrained(models / "tied")
    tiny_model(seed=2, tie_word_embeddings=False).save_pretrained(models / "untied")
    tiny_model(seed=3, hidden_size=48).save_pretrained(models / "target")
    tiny_model().save_pretrained(corpus / "model")
    for path in (*(models / name for name in ("tied", "untied", "target")), corpus / "model"):
        tokenizer.save_pretrained(path)
    source = _write_corpus(corpus, tokenizer, blocks=24)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    command += ["--master_port", str(scale_out.free_port()), scale_out.__file__]
    result = subprocess.run(
        [*command, str(models), str(scenarios), str(corpus)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return TwoProcesses(models, scenarios, corpus, source)


def _write_corpus(folder: Path, tokenizer: Any, blocks: int) -> Source:
    texts = ["".join(chr(97 + (n * 5 + i * (n + 3)) % 26) for i in range(40)) for n in range(60)]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (folder / "text.jsonl").write_text(lines, encoding="utf-8")
    source = Source(kind="files", name=str(folder / "text.jsonl"))
    open_corpus(
        [source],
        tokenizer,
        folder=folder / "data",
        tokens=blocks * BLOCK,
        max_length=BLOCK,
        eval_rows=0,
        seed=0,
        generated=folder,
    )
    return source
