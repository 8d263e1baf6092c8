"""Which settings a benchmark times, and the order in which it does.

A *setting* is a path, a draft and γ. Settings of one runtime share its models and take turns on
every prompt, so that the ratio of any two of them is over pairs that lie seconds apart.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from fastdraft_hf._progress import Progress
from fastdraft_hf.decode.records import DecodingRecord
from fastdraft_hf.eval.config import BenchConfig
from fastdraft_hf.eval.journal import Journal
from fastdraft_hf.eval.prompts import EvaluationPrompt

# The target alone, as each engine decodes it; what a path's speed is divided by.
BASELINES: Mapping[str, str] = {
    "transformers": "alone",
    "ours": "alone",
    "prompt-lookup": "alone",
    "openvino": "openvino-alone",
    "openvino-prompt-lookup": "openvino-alone",
    "ours-openvino": "ours-openvino-alone",
}

# The two are timed one after the other, each with the other's models gone. Both keep threads of
# their own (OpenMP's, TBB's) that go on spinning for a while after a call, which would slow down
# the other's next one; and the target would be in memory twice.
RUNTIMES: Mapping[str, tuple[str, ...]] = {
    "pytorch": ("transformers", "ours", "prompt-lookup"),
    "openvino": ("openvino", "openvino-prompt-lookup", "ours-openvino"),
}

# Every path that runs on OpenVINO, baselines included.
OPENVINO = (*RUNTIMES["openvino"], "openvino-alone", "ours-openvino-alone")

# Paths that take any draft, and those whose loop can run without drafting.
_ANY_DRAFT = ("transformers", "ours")
_OWN_LOOP = ("ours", "ours-openvino")
# Paths that map the columns of a reduced vocabulary back to ids: our loop by itself, GenAI by
# the scatter in the exported graph. Stock assisted generation reads the whole head.
_MAPS_BACK = ("ours", "openvino", "ours-openvino")
# The name of the draft that a recipe's section ``reduced_vocabulary`` makes.
REDUCED = "reduced"

# Tokens of a warm-up answer: every setting compiles, allocates and times its kernels once.
_WARM_UP_TOKENS = 16


@dataclass(frozen=True)
class Setting:
    """One way to decode.

    Attributes:
        path: a path of `BASELINES`, or one of its baselines.
        draft: name of another draft; empty for the run's own, and where none is used.
        num_assistant_tokens: γ; 0 for a baseline, and for our own loop without drafting.
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
        return Setting(BASELINES[self.path])

    @property
    def without_draft(self) -> Setting | None:
        """Our own loop with nothing drafted; ``None`` where there is no such thing."""
        return Setting(self.path) if self.path in _OWN_LOOP else None

    def label(self, repeat: int, prompt: EvaluationPrompt) -> str:
        """Return the journal's key of one timing."""
        return f"{self.name}/{self.num_assistant_tokens}/{repeat}/{prompt.task}/{prompt.key}"


# (setting, prompt, longest answer) -> record.
Decode = Callable[[Setting, EvaluationPrompt, int], DecodingRecord]


def assisted_settings(
    paths: Sequence[str],
    gammas: Sequence[int],
    drafts: Sequence[str] = (),
    reduced: Sequence[str] = (),
) -> list[Setting]:
    """Return every setting that drafts, those of one γ beside one another.

    Args:
        paths: what is timed with the run's own draft, or with none.
        gammas: values of γ.
        drafts: names of other drafts.
        reduced: those of ``paths`` on which the recipe's reduced draft is timed, if they can map
            its columns back.
    """
    ways = [Setting(path) for path in paths]
    ways += [Setting(path, draft) for path in paths if path in _ANY_DRAFT for draft in drafts]
    ways += [Setting(path, REDUCED) for path in paths if path in reduced and path in _MAPS_BACK]
    return [Setting(way.path, way.draft, gamma) for gamma in gammas for way in ways]


def all_settings(assisted: Sequence[Setting]) -> list[Setting]:
    """Return the settings with what they are compared to: baselines and loops without drafts."""
    needed = [s.baseline for s in assisted]
    needed += [s.without_draft for s in assisted if s.without_draft is not None]
    return [*dict.fromkeys(needed), *assisted]


def collect(
    name: str,
    decode: Decode,
    settings: Sequence[Setting],
    prompts: Sequence[EvaluationPrompt],
    config: BenchConfig,
    journal: Journal,
) -> None:
    """Time every prompt in every setting, greedily, settings in turn within a prompt.

    A drift of the machine's speed falls on all settings alike. What stands before or after in
    the row (caches, clock, heat) does too: the order is reversed on every second prompt, and for
    every prompt on its second repeat.

    Args:
        name: of the runtime, for the progress line.
        decode: does the work.
        settings: what is timed, baselines included.
        prompts: what is decoded.
        config: repeats and length of answers.
        journal: keeps what was timed; only what it lacks is.
    """
    plan = [
        (setting, repeat, prompt)
        for repeat in range(config.repeats)
        for place, prompt in enumerate(prompts)
        for setting in (settings if (repeat + place) % 2 == 0 else settings[::-1])
    ]
    due = [(s, r, p) for s, r, p in plan if s.label(r, p) not in journal]
    for setting in settings if due else ():  # not kept
        decode(setting, prompts[0], min(_WARM_UP_TOKENS, config.max_new_tokens))
    with Progress(f"bench {name}", len(plan), "answers", done=len(plan) - len(due)) as progress:
        for setting, repeat, prompt in due:
            record = decode(setting, prompt, config.max_new_tokens)
            journal.add(setting.label(repeat, prompt), record)
            progress.advance(1)
