"""Stage logits: store the target's top-k distribution over its generations."""

import logging
from pathlib import Path
from typing import Any

from fastdraft_hf._errors import FastDraftError
from fastdraft_hf._processes import on_main
from fastdraft_hf.data.config import LogitsConfig
from fastdraft_hf.data.filters import kept_indices
from fastdraft_hf.data.parts import stored_indices
from fastdraft_hf.data.target_logits import (
    DistributionReader,
    LogitsReader,
    ModelReader,
    write_target_logits,
)
from fastdraft_hf.export.openvino import cached_openvino, use_openvino
from fastdraft_hf.hub.folder import read_record
from fastdraft_hf.recipe import resolve_device
from fastdraft_hf.stages.run import Run
from fastdraft_hf.target.resolve import load_config

logger = logging.getLogger(__name__)


def run(run: Run, folder: Path) -> dict[str, Any]:
    """Store the distributions of every set, one folder each. All processes share the rows."""
    config = run.recipe.logits
    assert config is not None  # the stage is planned only with its section
    reader: DistributionReader
    if config.engine == "server":
        reader, how = _server_reader(run), {"engine": "server", "dtype": "the server's"}
    else:
        reader, how = open_reader(run.target.path, config, resolve_device(run.recipe.device))
    generated = run.stage_folder("generate")
    distribution: dict[str, Any] = {"top_k": config.top_k, "temperature": config.temperature}
    sets = {
        name: {"rows": write_target_logits(reader, generated / name, folder / name, **distribution)}
        for name in config.sets
    }
    return {"sets": sets, "top_k": config.top_k, **how}


def lacks_rows(folder: Path) -> bool:
    """Return whether a finished stage has fewer rows than the generated sets have kept rows."""
    generated = folder.with_name("generate")
    return any(
        len(stored_indices(folder / name)) < len(kept_indices(generated / name)[0])
        for name in read_record(folder)["facts"]["sets"]
    )


def open_reader(
    target: Path, config: LogitsConfig, device: str
) -> tuple[LogitsReader, dict[str, str]]:
    """Load the target; return its reader and the engine and type for the record."""
    if use_openvino(config.engine, device, "logits.engine", target):
        try:
            return _openvino_reader(target), {"engine": "openvino", "dtype": "float16"}
        except (FastDraftError, NotImplementedError) as error:
            if config.engine == "openvino":
                raise FastDraftError(
                    f"logits.engine: openvino cannot read this target: {error}"
                ) from error
            logger.warning("logits: using transformers, as OpenVINO cannot read it: %s", error)
    import torch
    from transformers import AutoModelForCausalLM

    from fastdraft_hf.train.config import has_fast_bf16

    dtype = torch.bfloat16 if has_fast_bf16(device) else torch.float32
    model = AutoModelForCausalLM.from_pretrained(target, dtype=dtype, trust_remote_code=False)
    model = model.to(device).eval()
    how = {"engine": "transformers", "dtype": str(dtype).removeprefix("torch.")}
    return ModelReader(model), how


def _server_reader(run: Run) -> DistributionReader:
    from fastdraft_hf.eval.servers import ServerReader

    generate = run.recipe.generate
    assert generate is not None  # the recipe is refused without its server
    assert generate.server is not None
    # The head may score more ids than the tokenizer has.
    vocab_size = load_config(run.target.path).get_text_config().vocab_size
    return ServerReader(generate.server, vocab_size)


def _openvino_reader(target: Path) -> LogitsReader:
    from fastdraft_hf.decode.openvino.paged import OpenVINOReader

    # Half precision is as exact as bfloat16 in PyTorch. int8, in which the target may have
    # generated, changes its distribution twice as much.
    logger.info("exporting the target to OpenVINO fp16 (once)")
    return OpenVINOReader(on_main(lambda: cached_openvino(target, "fp16")))
