"""Stage export: the trained draft in other engines' formats, compared with PyTorch.

Compression changes a draft's distribution. To measure what that costs in acceptance, the target
generates a few texts, and each form of the draft is scored along them: how many of its tokens would
have been accepted, exact in expectation, with one forward pass per text (`eval.expected`).
"""

import functools
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM

from fastdraft_hf.data.engines import TransformersEngine
from fastdraft_hf.data.parts import build_requests
from fastdraft_hf.draft.reduced_vocabulary import load_draft, read_reduced_vocabulary
from fastdraft_hf.eval import expected, metrics
from fastdraft_hf.export import parity
from fastdraft_hf.export.openvino import openvino_obstacle
from fastdraft_hf.recipe import resolve_device
from fastdraft_hf.stages.run import Run
from fastdraft_hf.target.resolve import load_tokenizer, stop_ids

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

    A reduced vocabulary stays reduced in OpenVINO, not in GGUF.
    """
    config = run.recipe.export
    formats = list(config.openvino)
    facts: dict[str, Any] = {}
    model = run.latest_model()
    if formats and (obstacle := openvino_obstacle(model)) is not None:
        logger.warning("export: no OpenVINO folder is made: %s", obstacle)
        formats = []
        facts["left_out"] = obstacle
    facts["openvino"] = formats
    if not formats and not config.gguf:
        return facts
    # (name of the form, output, weight format)
    jobs: list[tuple[str, Path, str]] = [
        (f"OpenVINO {form}", folder / f"openvino-{form}", form) for form in formats
    ]
    jobs += [(f"GGUF {kind}", folder / f"draft-{kind}.gguf", kind) for kind in config.gguf]
    sizes: dict[str, int] = {}
    loaders: dict[str, Any] = {"PyTorch": functools.partial(load_draft, model, dtype="float32")}
    if read_reduced_vocabulary(model) is not None:
        full = AutoModelForCausalLM.from_pretrained
        loaders["PyTorch, full vocabulary"] = functools.partial(full, model, dtype="float32")
    for name, output, weights in jobs:
        if not output.exists():
            logger.info("export: %s", name)
            record = folder / f"parity-{output.name}.json"
            found = parity.checked_export(model, output, weights, record=record)
            for line in found.lines() if found else ():
                logger.info("%s against PyTorch: %s", name, line)
        file = output if output.is_file() else output / "openvino_model.bin"
        sizes[name.replace("OpenVINO ", "").replace("GGUF", "gguf")] = file.stat().st_size
        loaders[name] = functools.partial(load_exported, model, output)
    facts["weight_bytes"] = sizes
    if config.gguf:
        facts["gguf"] = list(config.gguf)
    if config.acceptance_texts:
        facts["acceptance"] = read_acceptance(
            run.target.path,
            loaders,
            texts=config.acceptance_texts,
            temperature=run.recipe.evaluate.sampled[0],
            num_assistant_tokens=run.recipe.evaluate.gammas[0],
            seed=run.recipe.seed,
            device=resolve_device(run.recipe.device),
        )
        for line in acceptance_lines(facts["acceptance"]):
            logger.info(line)
    return facts


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
    tokenizer = load_tokenizer(target, "target")
    ends = stop_ids(target, tokenizer)
    prompts = [tuple(ids) for ids in tokenizer(list(PROMPTS[:texts]))["input_ids"]]
    requests = build_requests(
        prompts, temperatures=[temperature], max_new_tokens=NEW_TOKENS, seed=seed, source="export"
    )
    completions = TransformersEngine(target, ends, device=device).generate(requests, lambda _: None)
    continuations = [
        expected.Continuation("export", one.request.prompt_ids, one.ids) for one in completions
    ]
    model = load_draft(target, dtype="float32").to(device)
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
