"""Fixtures every part of the suite shares. Everything is offline; the embedded target is real."""

import os

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hypothesis
import pytest
import torch
from filelock import FileLock
from tiny_models import GEMMAS, KEPT, noisy, save_gemma
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from fastdraft_hf import FastDraftError
from fastdraft_hf._processes import drop_signal_stack
from fastdraft_hf.draft.reduced_vocabulary import write_reduced_vocabulary
from fastdraft_hf.export.openvino import WeightFormat, export_openvino
from fastdraft_hf.target.embedded import embedded_target

# Deadlines are timings, and derandomized runs fail on everybody's machine or on nobody's.
hypothesis.settings.register_profile(
    "suite",
    deadline=None,
    derandomize=True,
    max_examples=40,
    database=None,
    suppress_health_check=[
        hypothesis.HealthCheck.too_slow,
        hypothesis.HealthCheck.function_scoped_fixture,
    ],
)
hypothesis.settings.load_profile("suite")

# Processes of pytest-xdist share the cores, and sums over threads are not rounded alike each time.
torch.set_num_threads(1)

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(autouse=True)
def _own_process() -> Iterator[None]:
    yield
    drop_signal_stack()  # what OpenVINO leaves behind


@pytest.fixture(scope="session")
def target_folder() -> Path:
    """The embedded real target (SmolLM2-135M-Instruct), built once and cached."""
    return Path(embedded_target())


@pytest.fixture(scope="session")
def target_tokenizer(target_folder: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(target_folder)


def build_tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE that can write any text: 256 bytes, three special tokens, some merges."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=288,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the cat and the hat user assistant in on then that"], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    return build_tiny_tokenizer()


@pytest.fixture(scope="session")
def tiny_config(tiny_tokenizer: PreTrainedTokenizerFast) -> Callable[..., LlamaConfig]:
    """Make a tiny Llama configuration; keyword arguments override its fields."""

    def make(**overrides: Any) -> LlamaConfig:
        settings: dict[str, Any] = {
            "vocab_size": len(tiny_tokenizer),
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "bos_token_id": tiny_tokenizer.bos_token_id,
            "eos_token_id": tiny_tokenizer.eos_token_id,
            "pad_token_id": tiny_tokenizer.pad_token_id,
            "tie_word_embeddings": True,
            "dtype": "float32",
        }
        return LlamaConfig(**{**settings, **overrides})

    return make


@pytest.fixture(scope="session")
def tiny_model(tiny_config: Callable[..., LlamaConfig]) -> Callable[..., LlamaForCausalLM]:
    """Make a tiny random Llama: ``tiny_model(seed=0, **config overrides)``."""

    def make(seed: int = 0, **overrides: Any) -> LlamaForCausalLM:
        state = torch.random.get_rng_state()
        torch.manual_seed(seed)
        model = LlamaForCausalLM(tiny_config(**overrides)).eval()
        torch.random.set_rng_state(state)
        # Initial weights are so small that every logit is nearly equal: sharpen them, so that
        # greedy choices are no accident of rounding.
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(8)
        return model

    return make


@pytest.fixture(scope="session")
def tiny_target_folder(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_model: Callable[..., LlamaForCausalLM],
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> Path:
    """A saved tiny target: safetensors, configuration and tokenizer. Read it, never write in it."""
    folder = tmp_path_factory.mktemp("tiny_target") / "target"
    tiny_model().save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def noisy_draft_folder(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_model: Callable[..., LlamaForCausalLM],
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> Path:
    """A saved draft that is right now and then: the tiny target with noise on its weights."""
    folder = tmp_path_factory.mktemp("noisy_draft") / "draft"
    noisy(tiny_model()).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def reduced_draft_folder(
    tmp_path_factory: pytest.TempPathFactory, tiny_target_folder: Path
) -> Path:
    """A saved draft that is the tiny target itself, with half of the tokens in its head."""
    folder = tmp_path_factory.mktemp("reduced_draft") / "draft"
    shutil.copytree(tiny_target_folder, folder)
    write_reduced_vocabulary(folder, KEPT)
    return folder


@pytest.fixture(scope="session")
def openvino_models(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_target_folder: Path,
    noisy_draft_folder: Path,
    reduced_draft_folder: Path,
) -> SimpleNamespace:
    """Tiny models as OpenVINO, made in one start of the exporter. Never write in their folders.

    A start takes longer than a tiny model: a test that exports by itself costs ten seconds. The
    processes of pytest-xdist share the models. Beside them there are ``sources``, the folder that
    Gemma's exports were made from; ``broken``, a model that cannot be exported; and ``error``, the
    message about it.
    """
    pytest.importorskip("openvino_genai")
    pytest.importorskip("optimum.intel")
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    root, broken, error = shared / "openvino", shared / "broken", shared / "openvino-error.txt"
    sources = shared / "sources"
    jobs: list[tuple[Path, Path, WeightFormat]] = [
        (tiny_target_folder, root / "target", "fp32"),
        (noisy_draft_folder, root / "draft", "fp32"),
        (reduced_draft_folder, root / "reduced", "fp32"),
        (tiny_target_folder, root / "target_int8", "int8"),
        (reduced_draft_folder, root / "reduced_int8", "int8"),
        *((sources / family, root / family, "fp32") for family in GEMMAS),
    ]
    with FileLock(shared / "openvino.lock"):
        if not error.exists():
            broken.mkdir()
            config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
            (broken / "config.json").write_text(json.dumps(config), encoding="utf-8")
            root.mkdir()
            for family in GEMMAS:
                save_gemma(family, sources / family)
            with pytest.raises(FastDraftError) as caught:
                export_openvino(*jobs, (broken, root / "broken", "int8"))
            # Nothing temporary is left, and nothing of the model that failed.
            assert {p.name for p in root.iterdir()} == {output.name for _, output, _ in jobs}
            error.write_text(str(caught.value), encoding="utf-8")
    return SimpleNamespace(
        sources=sources,
        **{output.name: output for _, output, _ in jobs},
        error=error.read_text(encoding="utf-8"),
        broken=broken,
    )


@pytest.fixture(scope="session")
def evaluate_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep what `evaluate` copies and writes out of the user's cache."""
    import evaluate

    folder = tmp_path_factory.mktemp("evaluate")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate.config, "HF_MODULES_CACHE", str(folder / "modules"))
        patch.setattr(evaluate.config, "HF_METRICS_CACHE", str(folder / "metrics"))
        patch.setattr(sys, "path", list(sys.path))  # `evaluate` adds the folder of the modules
        yield
