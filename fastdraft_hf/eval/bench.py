"""What a benchmark times, and in which order.

A *setting* is a path, a draft and γ. The settings of one runtime share its models and take turns on
every prompt, so that any two of them are compared over pairs that are seconds apart.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from fastdraft_hf._progress import Progress
from fastdraft_hf.decode.records import DecodingRecord
from fastdraft_hf.eval.config import BenchConfig
from fastdraft_hf.eval.journal import Journal
from fastdraft_hf.eval.prompts import EvaluationPrompt

# The target alone, through the kernels of the path: our own loop is compared to itself with
# nothing drafted, so that a speed-up is the draft's and not the loop's.
BASELINES: Mapping[str, str] = {
    "transformers": "alone",
    "ours": "ours",
    "prompt-lookup": "alone",
    "openvino": "openvino-alone",
    "openvino-prompt-lookup": "openvino-alone",
    "ours-openvino": "ours-openvino",
}
# The target alone as the library decodes it by itself; over this a path's baseline shows what our
# loop's kernels bring.
STOCK: Mapping[str, str] = {"ours": "alone", "ours-openvino": "ours-openvino-alone"}

# The runtimes are timed one after the other, each with the other's models released. Both keep
# threads (OpenMP's, TBB's) that spin for a while after a call and would slow down the other's next
# one, and the target would be in memory twice.
RUNTIMES: Mapping[str, tuple[str, ...]] = {
    "pytorch": ("transformers", "ours", "prompt-lookup"),
    "openvino": ("openvino", "openvino-prompt-lookup", "ours-openvino"),
}
# Every path that runs on OpenVINO, baselines included.
OPENVINO = (*RUNTIMES["openvino"], "openvino-alone", "ours-openvino-alone")

# Paths that take any draft.
_ANY_DRAFT = ("transformers", "ours")
# Paths that map the columns of a reduced vocabulary back to ids: our loop by itself, GenAI by the
# scatter in the exported graph. Stock assisted generation reads the unreduced head.
_MAPS_BACK = ("ours", "openvino", "ours-openvino")
# The name of the draft that stage ``reduced_vocabulary`` makes.
REDUCED = "reduced"

# Length of a warm-up answer: every setting compiles, allocates and times its kernels once.
_WARM_UP_TOKENS = 16


@dataclass(frozen=True)
class Setting:
    """One way to decode.

    Attributes:
        path: a path of `BASELINES`, or one of its baselines.
        draft: name of another draft; empty for the draft that is measured, and where none is used.
        num_assistant_tokens: γ; 0 decodes with the target alone.
    """

    path: str
    draft: str = ""
    num_assistant_tokens: int = 0

    @property
    def name(self) -> str:
        """Path and draft: the key of results."""
        return f"{self.path}/{self.draft}" if self.draft else self.path

    @property
    def baseline(self) -> Setting:
        """The target alone through the same kernels."""
        return Setting(BASELINES[self.path])

    @property
    def stock(self) -> Setting | None:
        """The target alone as the library decodes it, if the baseline is another one."""
        return Setting(STOCK[self.path]) if self.path in STOCK else None

    def label(self, repeat: int, prompt: EvaluationPrompt) -> str:
        """Return the journal's key of one timing."""
        return f"{self.name}/{self.num_assistant_tokens}/{repeat}/{prompt.task}/{prompt.key}"


# An engine: (setting, prompt, length limit) -> record.
Decode = Callable[[Setting, EvaluationPrompt, int], DecodingRecord]
# One timing of all settings: repeat, prompt.
Block = tuple[int, EvaluationPrompt]


def assisted_settings(
    paths: Sequence[str],
    gammas: Sequence[int],
    drafts: Sequence[str] = (),
    reduced: Sequence[str] = (),
) -> list[Setting]:
    """Return every setting that drafts, those with the same γ next to each other.

    Args:
        paths: what is timed with the draft that is measured, or without a draft model.
        gammas: values of γ.
        drafts: names of other drafts.
        reduced: those of ``paths`` on which the draft with the reduced vocabulary is timed, if
            they can map its columns back.
    """
    ways = [(path, "") for path in paths]
    ways += [(path, draft) for path in paths if path in _ANY_DRAFT for draft in drafts]
    ways += [(path, REDUCED) for path in paths if path in reduced and path in _MAPS_BACK]
    return [Setting(*way, gamma) for gamma in gammas for way in ways]


def all_settings(assisted: Sequence[Setting]) -> list[Setting]:
    """Return the settings, preceded by what they are compared to: stock decoding and baselines."""
    stock = [s.stock for s in assisted if s.stock is not None]
    return [*dict.fromkeys([*stock, *(s.baseline for s in assisted)]), *assisted]


def collect(
    name: str,
    decode: Decode,
    settings: Sequence[Setting],
    prompts: Sequence[EvaluationPrompt],
    config: BenchConfig,
    journal: Journal[DecodingRecord],
    deadline: float = math.inf,
) -> None:
    """Time every prompt in every setting, greedily; the settings take turns within a prompt.

    A drift of the machine's speed affects all settings alike. So does the position in the turn
    (caches, clock, heat): the order is reversed on every second prompt of a task set, and on the
    second repeat of every prompt.

    Args:
        name: of the runtime, for the progress line.
        decode: the engine.
        settings: what is timed, baselines included.
        prompts: in the order of `draw_prompts`, task sets in turn.
        config: repeats and length of answers.
        journal: keeps the timings; only missing ones are made.
        deadline: of ``time.monotonic``; after it no further prompt is started, once every task
            set has one.
    """
    tasks = list(dict.fromkeys(prompt.task for prompt in prompts))
    seen: Counter[tuple[int, str]] = Counter()
    turns: list[tuple[EvaluationPrompt, list[tuple[Setting, str]], bool]] = []
    for repeat in range(config.repeats):
        for prompt in prompts:
            number = seen[repeat, prompt.task]
            seen[repeat, prompt.task] += 1
            even = (repeat + number + tasks.index(prompt.task)) % 2 == 0
            labels = [(s, s.label(repeat, prompt)) for s in settings[:: 1 if even else -1]]
            missing = [(s, label) for s, label in labels if label not in journal]
            turns.append((prompt, missing, repeat == number == 0))
    due = sum(len(missing) for _, missing, _ in turns)
    for setting in settings if due else ():  # not kept
        decode(setting, prompts[0], min(_WARM_UP_TOKENS, config.max_new_tokens))
    total = len(turns) * len(settings)
    with Progress(f"bench {name}", total, "answers", done=total - due) as progress:
        for prompt, missing, needed in turns:
            if not needed and time.monotonic() > deadline:
                break
            for setting, label in missing:
                journal.add(label, decode(setting, prompt, config.max_new_tokens))
                progress.advance(1)


def complete_blocks(
    journal: Journal[DecodingRecord],
    settings: Sequence[Setting],
    prompts: Sequence[EvaluationPrompt],
    config: BenchConfig,
) -> list[Block]:
    """Return the repeats of prompts that were timed in every setting, in the order of time."""
    blocks = [(repeat, prompt) for repeat in range(config.repeats) for prompt in prompts]
    return [b for b in blocks if all(s.label(*b) in journal for s in settings)]
