"""Documents to ids: closed, counted, hashed, and the same in several processes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fastdraft_hf.data import encoding
from fastdraft_hf.data.encoding import DocumentEncoder, batches, document_end, encode_batches
from fastdraft_hf.data.prompts import free_prefix

END = 0


class Overlaps:
    """A check that another process can be sent."""

    def __call__(self, text: str) -> bool:
        return "secret" in text


def ids_of(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def test_a_document_is_closed_by_what_opens_free_text(tiny_tokenizer: Any) -> None:
    assert document_end(tiny_tokenizer) == free_prefix(tiny_tokenizer)[-1] == END
    encoder = DocumentEncoder(tiny_tokenizer, lambda text: False)
    cat, hat = ids_of(tiny_tokenizer, "the cat"), ids_of(tiny_tokenizer, "hät")
    made = encoder(["the cat", "hät"])
    assert made.ids.tolist() == [*cat, END, *hat, END]
    assert made.lengths.tolist() == [len(cat) + 1, len(hat) + 1]
    assert made.sizes.tolist() == [7, 4]  # UTF-8 bytes
    assert made.ids.dtype == np.uint16


def test_the_targets_own_text_is_closed_once_and_alike(tiny_tokenizer: Any) -> None:
    """Free text begins with the end of the document before; an answer with its prompt."""
    encoder = DocumentEncoder(tiny_tokenizer, lambda text: False)
    made = encoder([[END, 5, 6], [1, 7, 2], [END, 8, END]])
    assert made.ids.tolist() == [5, 6, END, 1, 7, 2, END, 8, END]
    assert made.lengths.tolist() == [3, 4, 2]


def test_what_is_left_out_is_counted(tiny_tokenizer: Any) -> None:
    encoder = DocumentEncoder(tiny_tokenizer, Overlaps())
    secret = ids_of(tiny_tokenizer, "a secret")
    made = encoder(["", " \n", "a secret", secret, "the hat", "broken \ud800 pair"])
    assert made.dropped == {"empty": 2, "overlaps held-out text": 2}
    assert len(made.lengths) == len(made.hashes) == 2
    nothing = encoder(["", "a secret"])
    assert (len(nothing.ids), len(nothing.lengths)) == (0, 0)


def test_a_special_token_in_a_document_does_not_end_it(tiny_tokenizer: Any) -> None:
    made = DocumentEncoder(tiny_tokenizer, lambda text: False)(["cat<|endoftext|>hat<|im_end|>"])
    assert np.flatnonzero(made.ids == END).tolist() == [len(made.ids) - 1]
    assert tiny_tokenizer.eos_token_id not in made.ids


def test_large_vocabularies_take_four_bytes(tiny_tokenizer: Any) -> None:
    class Large:
        backend_tokenizer = tiny_tokenizer.backend_tokenizer
        get_vocab = tiny_tokenizer.get_vocab

        def __len__(self) -> int:
            return 70_000

    made = DocumentEncoder(Large(), lambda text: False)(["the cat"])  # type: ignore[arg-type]
    assert made.ids.dtype == np.uint32


def test_a_tokenizer_without_the_fast_library(tiny_tokenizer: Any) -> None:
    class Slow:
        backend_tokenizer = None
        get_vocab = tiny_tokenizer.get_vocab
        encode = tiny_tokenizer.encode

        def __len__(self) -> int:
            return len(tiny_tokenizer)

    texts: list[Any] = ["the cat", "that hat<|im_end|>"]
    ours = DocumentEncoder(Slow(), lambda text: False)(texts)  # type: ignore[arg-type]
    theirs = DocumentEncoder(tiny_tokenizer, lambda text: False)(texts)
    assert ours.ids.tolist() == theirs.ids.tolist()


def test_two_processes_give_what_one_does(
    tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoding, "_ALONE_CHARS", 100)
    texts: list[Any] = [f"the cat {n} " + "and the hat " * (n % 5) for n in range(200)]
    texts[7] = "a secret"
    encoder = DocumentEncoder(tiny_tokenizer, Overlaps())
    tagged = [(batch, number) for number, batch in enumerate(batches(texts, 300))]
    one, two = (list(encode_batches(encoder, tagged, processes)) for processes in (1, 2))
    assert [tag for _, tag in two] == list(range(len(tagged)))
    for (ours, _), (theirs, _) in zip(one, two, strict=True):
        assert ours.ids.tolist() == theirs.ids.tolist()
        assert ours.hashes.tolist() == theirs.hashes.tolist()
        assert ours.dropped == theirs.dropped


def test_batches_keep_every_document_in_order() -> None:
    texts: list[Any] = ["a" * n for n in range(20)]
    made = list(batches(texts, 25))
    assert [text for batch in made for text in batch] == texts
    assert all(sum(map(len, batch)) >= 25 for batch in made[:-1])
