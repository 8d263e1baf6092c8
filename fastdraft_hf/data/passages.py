"""Instructions about a passage of text: what users paste, and what they want done with it.

Much of what a target answers repeats words of its prompt, and a draft has to learn to copy them.
Magpie seldom generates a prompt that holds a text. The passages are paragraphs of the documentation
of installed packages and of the standard library.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from fastdraft_hf.data import installed

# What a user says; {} is the passage.
TASKS = (
    "Rewrite this text in simpler words:\n\n{}",
    "Rewrite the following so that it sounds more formal.\n\n{}",
    "Correct the grammar and spelling of this text: {}",
    "Summarize the following text in one sentence.\n\n{}",
    "Summarize this: {}",
    "{}\n\nWhat is the main point of this text?",
    "Here is a text:\n\n{}\n\nList its most important points.",
    "List the key terms of this passage and say what each of them means.\n\n{}",
    "Turn this into bullet points:\n\n{}",
    "Make this shorter without leaving anything important out: {}",
    'Explain this to a beginner: "{}"',
    "{}\n\nExplain the text above.",
    "Write a title for this text, then the text itself with the title above it:\n\n{}",
    "Rephrase: {}",
    "Proofread this and give me the corrected version:\n\n{}",
    "Write three questions about this text and answer them.\n\n{}",
    "Quote the most important sentence of this text and say why it matters.\n\n{}",
    "Translate the following into Spanish: {}",
    "Continue this text:\n\n{}",
    "Write an email to a colleague that explains this: {}",
    'Is the tone of this text positive, negative or neutral? Give reasons.\n\n"{}"',
    "Repeat this text word for word, then comment on it: {}",
    "Use only what is said here to answer. What is it about, and who would need it?\n\n{}",
    "Turn the text below into a dialogue between a student and a teacher.\n\n{}",
)
_SHORTEST, _LONGEST = 25, 140  # words
# Markup, tables, lists, code and links are not prose.
_MARKUP = re.compile(r"[`|<>{}\\=#*_]|https?:|::|>>>|\.\. |---|\[|\]")
_WORD = re.compile(r"[A-Za-z][A-Za-z'’-]*")


def passages(texts: Iterable[str]) -> Iterator[str]:
    """Yield the paragraphs that are prose, each on one line."""
    for text in texts:
        for paragraph in re.split(r"\n\s*\n", text):
            line = " ".join(paragraph.split())
            words = _WORD.findall(line)
            if not _SHORTEST <= len(words) <= _LONGEST or _MARKUP.search(line):
                continue
            # A sentence begins with a capital letter and ends with a stop; names and numbers in a
            # row (lists of authors, versions) have few short words.
            short = sum(len(word) <= 4 for word in words)
            if line[0].isupper() and line[-1] in ".!?" and short >= 0.3 * len(words):
                yield line


def passage_instructions(seed: int) -> Iterator[str]:
    """Yield an instruction about every passage on this machine, in the seed's order.

    Files are read when they are needed. The passages change with the installed packages.
    """
    chosen = random.Random(seed)
    documents: list[str | Path] = list(installed.licenses())
    documents += [*installed.package_files(), *installed.library_files()]
    chosen.shuffle(documents)
    for document in documents:
        if isinstance(document, str):
            texts: Iterable[str] = [installed.description(document)]
        else:
            texts = installed.docstrings(document)
        for passage in passages(texts):
            yield chosen.choice(TASKS).format(passage)
