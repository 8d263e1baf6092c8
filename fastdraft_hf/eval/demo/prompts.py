"""The prompts of `fastdraft demo`. None is from HumanEval or IFBench, and a test says so."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from fastdraft_hf._errors import FastDraftError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class DemoPrompt:
    """One prompt.

    Attributes:
        name: a word for headings.
        text: what the user gives.
        kind: ``code`` is continued as it stands; an ``instruction`` is put into the chat template.
    """

    name: str
    text: str
    kind: Literal["code", "instruction"]

    def ids(self, tokenizer: PreTrainedTokenizerBase, chat: bool | None) -> tuple[int, ...]:
        """Return the ids that the models read.

        Args:
            tokenizer: the target's; one without a chat template reads plain text.
            chat: whether the chat template is used; ``None`` leaves it to ``kind``.

        Raises:
            FastDraftError: there is nothing to read.
        """
        from fastdraft_hf.data.prompts import chat_ids

        if self.kind == "instruction" if chat is None else chat:
            return chat_ids(tokenizer, self.text)
        ids = tuple(tokenizer(self.text)["input_ids"])
        if not ids:
            raise FastDraftError("prompt: it is empty")
        return ids


# Code ends within a line or at its end, not after it: the line break and the indentation that
# follows are one token of most vocabularies.
PROMPTS = (
    DemoPrompt(
        "a class",
        'class Account:\n    """A bank account that keeps its history."""\n\n'
        "    def __init__(self, owner):",
        "code",
    ),
    DemoPrompt(
        "a script",
        "import argparse\nimport json\nfrom pathlib import Path\n\n\n"
        'def main():\n    parser = argparse.ArgumentParser(description="Merge JSON files")',
        "code",
    ),
    DemoPrompt(
        "a question",
        "Why is the sky blue during the day and red in the evening?",
        "instruction",
    ),
    DemoPrompt(
        "a request",
        "Write a short letter to a neighbour who watered my plants while I was away.",
        "instruction",
    ),
)
