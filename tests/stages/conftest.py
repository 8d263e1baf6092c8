from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from fastdraft_hf.data.engines import Completion, Request

Answer = Callable[[Request], Iterable[int]]


class AnsweringEngine:
    """Answers every request with ``answer(request)``, and keeps the requests."""

    name = "answering"

    def __init__(self, answer: Answer) -> None:
        self.answer, self.asked = answer, list[Request]()

    def generate(
        self, requests: Iterable[Request], on_tokens: Callable[[int], object]
    ) -> Iterator[Completion]:
        for request in requests:
            self.asked.append(request)
            yield Completion(request, tuple(self.answer(request)), "length")


@pytest.fixture
def make_engine() -> type[AnsweringEngine]:
    return AnsweringEngine


@pytest.fixture
def save_draft(
    tmp_path: Path,
    tiny_model: Callable[..., LlamaForCausalLM],
    tiny_tokenizer: PreTrainedTokenizerBase,
) -> Callable[..., Path]:
    """Save a tiny model of one layer with a tokenizer: ``save_draft("name", **config)``."""

    def save(name: str, tokenizer: PreTrainedTokenizerBase | None = None, **config: int) -> Path:
        folder = tmp_path / name
        model = tiny_model(**{"seed": 5, "num_hidden_layers": 1, **config})
        model.save_pretrained(folder)
        (tokenizer or tiny_tokenizer).save_pretrained(folder)
        return folder

    return save
