"""Tasks about a passage of text, which the prompt contains.

Answers repeat much of such prompts, and a draft has to learn to copy. Magpie seldom gives prompts
that contain a text. The passages are paragraphs of the documentation of installed packages and of
the standard library; each is used once.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from fastdraft_hf.data import installed, python_source

# The user's message with a place for the passage.
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
    """Yield the paragraphs of documents that are prose, one line each."""
    for text in texts:
        for paragraph in re.split(r"\n\s*\n", text):
            line = " ".join(paragraph.split())
            words = _WORD.findall(line)
            if not _SHORTEST <= len(words) <= _LONGEST or _MARKUP.search(line):
                continue
            # Prose starts with a capital letter and ends with a stop. Lists of names and versions
            # have few short words.
            short = sum(len(word) <= 4 for word in words)
            if line[0].isupper() and line[-1] in ".!?" and short >= 0.3 * len(words):
                yield line


def passage_instructions(seed: int) -> Iterator[str]:
    """Yield a task about every passage on this machine, in the seed's order.

    The passages depend on the installed packages. Files are read as they are needed.
    """
    chosen = random.Random(seed)
    places: list[str | Path] = [name for name, _, _ in installed.packages()[0]]
    places += [*installed.source_files(), *python_source.source_files()]
    chosen.shuffle(places)
    for place in places:
        for passage in passages(_texts(place)):
            yield chosen.choice(TASKS).format(passage)


def _texts(place: str | Path) -> Iterable[str]:
    """Return a package's description, or the docstrings of a file."""
    if isinstance(place, str):
        return [installed.description(place)]
    return installed.docstrings(place)
