"""Stage export: the trained draft in other engines' formats, compared with PyTorch.

Compression changes a draft's distribution. To measure what that costs in acceptance, the target
generates a few texts, and each form of the draft is scored along them: how many of its tokens would
have been accepted, exact in expectation, with one forward pass per text (`eval.expected`).
"""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastdraft_hf._atomic import write_json
from fastdraft_hf._extras import openvino_available
from fastdraft_hf.draft.reduced_vocabulary import load_draft
from fastdraft_hf.eval.bench import REDUCED
from fastdraft_hf.export import parity
from fastdraft_hf.export.gguf import export_gguf
from fastdraft_hf.export.openvino import export_openvino
from fastdraft_hf.recipe import resolve_device
from fastdraft_hf.stages.run import Run

logger = logging.getLogger(__name__)

# Prompts of the texts; none of them is an evaluation prompt.
PROMPTS = (
    *parity.PROMPTS,
    "Question: Why does bread rise in the oven?\nAnswer:",
    "Dear neighbours,\n\nnext Saturday we will",
    "import csv\n\n\ndef read_prices(path):\n",
    "Three things are worth packing for a week in the mountains:",
)
NEW_TOKENS = 48


def run(run: Run, folder: Path) -> dict[str, Any]:
    """Write ``openvino-<format>`` folders and ``draft-<type>.gguf`` files.

    With a section ``reduced_vocabulary`` also ``reduced-openvino-<format>``; GGUF has none.
    """
    config = run.recipe.export
    formats = list(config.openvino)
    facts: dict[str, Any] = {}
    if formats and not openvino_available():
        logger.warning("export: OpenVINO is not installed, so no OpenVINO folder is made")
        formats = []
        facts["left_out"] = "the openvino extra is not installed"
    facts["openvino"] = formats
    if not formats and not config.gguf:
        return facts
    model = run.latest_model()
    # (model, name of the form, output, weight format)
    jobs: list[tuple[Path, str, Path, Any]] = [
        (model, f"OpenVINO {form}", folder / f"openvino-{form}", form) for form in formats
    ]
    if run.recipe.reduced_vocabulary is not None:
        reduced = run.stage_folder("reduced_vocabulary")
        for form in formats:
            if form == "int4":
                logger.warning("export: a reduced vocabulary in int4 is not supported; left out")
                continue
            output = folder / f"{REDUCED}-openvino-{form}"
            jobs.append((reduced, f"{REDUCED} OpenVINO {form}", output, form))
    for kind in config.gguf:
        jobs.append((model, f"GGUF {kind}", folder / f"draft-{kind}.gguf", kind))
    sizes: dict[str, int] = {}
    loaders: dict[str, Any] = {"PyTorch": functools.partial(load_draft, model, dtype="float32")}
    for source, name, output, form in jobs:
        gguf = output.suffix == ".gguf"
        if not output.exists():
            logger.info("export: %s", name)
            (export_gguf if gguf else export_openvino)(source, output, form)
        compared = output.with_name(f"parity-{output.name}.json")
        if config.check and not compared.exists():
            found = parity.check_export(source, output, form)
            for line in found.lines():
                logger.info("%s against PyTorch: %s", name, line)
            write_json(compared, found.facts())
        key = name.replace("OpenVINO ", "").replace("GGUF", "gguf")
        sizes[key] = (output if gguf else output / "openvino_model.bin").stat().st_size
        loaders[name] = functools.partial(load_exported, source, output)
    facts["weight_bytes"] = sizes
    if config.gguf:
        facts["gguf"] = list(config.gguf)
    if config.acceptance_texts:
        facts["acceptance"] = _acceptance(run, folder / "acceptance.json", loaders)
    return facts


def _acceptance(run: Run, record: Path, loaders: dict[str, Any]) -> dict[str, Any]:
    """Measure every form once; a resumed stage reads the record."""
    if not record.exists():
        evaluate = run.recipe.evaluate
        reading = read_acceptance(
            run.target.path,
            loaders,
            texts=run.recipe.export.acceptance_texts,
            temperature=evaluate.sampled[0],
            num_assistant_tokens=evaluate.gammas[0],
            seed=run.recipe.seed,
            device=resolve_device(run.recipe.device),
        )
        for line in acceptance_lines(reading):
            logger.info(line)
        write_json(record, reading)
    found: dict[str, Any] = json.loads(record.read_text(encoding="utf-8"))
    return found


def load_exported(model: Path, exported: Path) -> Any:
    """Return an exported draft as users run it; ``model`` is the folder it was made from."""
    if exported.is_file():
        return parity.read_gguf(model, exported)
    from optimum.intel import OVModelForCausalLM

    return OVModelForCausalLM.from_pretrained(exported)


def read_acceptance(
    target: Path,
    drafts: Mapping[str, Callable[[], Any]],
    *,
    texts: int = len(PROMPTS),
    temperature: float = 0.6,
    num_assistant_tokens: int = 3,
    seed: int = 0,
    device: str = "cpu",
) -> dict[str, Any]:
    """Let the target generate texts and return the expected acceptance of each form of a draft.

    Args:
        target: the target's folder.
        drafts: name of a form -> how to load it; one is in memory at a time.
        texts: number of texts, at most one per prompt.
        temperature: above 0; of the texts and of the acceptance.
        num_assistant_tokens: γ.
        seed: of the sampling.
        device: the target's, cpu or cuda; drafts stay where they were loaded.

    Returns:
        ``texts`` and ``tokens`` of the target, ``temperature``, ``num_assistant_tokens``, and
        ``drafts``: of each form the ``name``, ``acceptance_rate`` (accepted per drafted token) and
        ``block_efficiency`` (tokens per forward pass of the target).
    """
    from fastdraft_hf.draft.reduced_vocabulary import load_draft
    from fastdraft_hf.eval import expected, metrics
    from fastdraft_hf.target.resolve import load_tokenizer, stop_ids

    tokenizer = load_tokenizer(target, "target")
    ends = stop_ids(target, tokenizer)
    model = load_draft(target, dtype="float32").to(device)
    continuations = _completions(model, tokenizer, PROMPTS[:texts], ends, temperature, seed)
    found = []
    for name, load in drafts.items():
        draft = load()
        read = [
            expected.text_acceptance(model, draft, text, temperature, ends)
            for text in continuations
        ]
        del draft
        rounds = [expected.expected_rounds(one, num_assistant_tokens, NEW_TOKENS) for one in read]
        found.append(
            {
                "name": name,
                "acceptance_rate": metrics.acceptance_rate(rounds),
                "block_efficiency": metrics.block_efficiency(rounds),
            }
        )
    return {
        "texts": len(continuations),
        "tokens": sum(len(text.ids) for text in continuations),
        "temperature": temperature,
        "num_assistant_tokens": num_assistant_tokens,
        "drafts": found,
    }


def acceptance_lines(reading: Mapping[str, Any]) -> list[str]:
    """Return the result of `read_acceptance` for a terminal."""
    width = max(len(one["name"]) for one in reading["drafts"])
    head = (
        f"expected acceptance rate (γ = {reading['num_assistant_tokens']}, T = "
        f"{reading['temperature']:g}, {reading['texts']} texts of the target, {reading['tokens']} "
        "tokens):"
    )
    return [head] + [
        f"  {one['name']:<{width}}  {one['acceptance_rate']:.3f}, "
        f"{one['block_efficiency']:.2f} tokens per pass of the target"
        for one in reading["drafts"]
    ]


def _completions(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    ends: Collection[int],
    temperature: float,
    seed: int,
) -> list[Any]:
    """Return the target's completions, sampled in one batch and cut after their first end token."""
    import torch
    from transformers import set_seed

    from fastdraft_hf.eval.expected import Continuation

    rows = [ids for text in prompts if (ids := tokenizer(text)["input_ids"])]
    width, pad = max(map(len, rows)), min(ends)
    padded = [[pad] * (width - len(row)) + row for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    set_seed(seed)
    output = model.generate(
        input_ids=torch.tensor(padded, device=model.device),
        attention_mask=torch.tensor(mask, device=model.device),
        max_new_tokens=NEW_TOKENS,
        do_sample=True,
        temperature=temperature,
        top_k=0,
        top_p=1.0,
        eos_token_id=sorted(ends),
        pad_token_id=pad,
    )
    texts = []
    for row, tokens in zip(rows, output[:, width:].tolist(), strict=True):
        last = next((i for i, token in enumerate(tokens) if token in ends), len(tokens) - 1)
        texts.append(Continuation("export", tuple(row), tuple(tokens[: last + 1])))
    return texts
