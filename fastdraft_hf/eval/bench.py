"""Time the target alone and with its draft: the settings, the models, and the order of timings.

A *setting* is a path and γ. The settings of one runtime share its models and take turns on
every prompt, so that any two of them are compared over pairs that are seconds apart.
"""

from __future__ import annotations

import gc
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastdraft_hf._progress import Progress
from fastdraft_hf.decode.records import DecodingRecord
from fastdraft_hf.decode.settings import LOOKUP
from fastdraft_hf.eval.config import SERVERS, BenchConfig
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
# one, and the target would be in memory twice. OpenVINO comes first: if the time is short, it is
# the runtime to know about on the machines that have it.
RUNTIMES: Mapping[str, tuple[str, ...]] = {
    "openvino": ("openvino", "openvino-prompt-lookup", "ours-openvino"),
    "pytorch": ("transformers", "ours", "prompt-lookup"),
    "server": SERVERS,
}
# Every path that runs on OpenVINO, baselines included.
OPENVINO = (*RUNTIMES["openvino"], "openvino-alone", "ours-openvino-alone")

# Length of a warm-up answer: every setting compiles, allocates and times its kernels once.
_WARM_UP_TOKENS = 16


@dataclass(frozen=True)
class Setting:
    """One way to decode.

    Attributes:
        path: a path of `BASELINES`, or one of its baselines.
        num_assistant_tokens: γ; 0 decodes with the target alone.
    """

    path: str
    num_assistant_tokens: int = 0

    @property
    def baseline(self) -> Setting:
        """The target alone through the same kernels; of an engine's server, another one."""
        return Setting(BASELINES.get(self.path, self.path))

    @property
    def stock(self) -> Setting | None:
        """The target alone as the library decodes it, if the baseline is another one."""
        return Setting(STOCK[self.path]) if self.path in STOCK else None

    def label(self, prompt: EvaluationPrompt) -> str:
        """Return the journal's key of one timing."""
        return f"{self.path}/{self.num_assistant_tokens}/{prompt.task}/{prompt.key}"


def assisted_settings(paths: Sequence[str], gammas: Sequence[int]) -> list[Setting]:
    """Return every setting that drafts, those with the same γ next to each other."""
    return [Setting(path, gamma) for gamma in gammas for path in paths]


def all_settings(assisted: Sequence[Setting]) -> list[Setting]:
    """Return the settings, preceded by what they are compared to: stock decoding and baselines."""
    stock = [s.stock for s in assisted if s.stock is not None]
    return [*dict.fromkeys([*stock, *(s.baseline for s in assisted)]), *assisted]


@dataclass(frozen=True)
class Models:
    """The folders of the models.

    Attributes:
        draft: empty for the server paths.
        device: cpu or cuda, of the PyTorch paths; OpenVINO runs on the CPU.
        stop_ids: tokens that end an answer; empty for those of the target's generation config.
        server, server_alone: URLs of an engine with the draft, and of one without.
    """

    target: str
    draft: str = ""
    target_openvino: str = ""
    draft_openvino: str = ""
    device: str = "cpu"
    stop_ids: list[int] = field(default_factory=list)
    server: str = ""
    server_alone: str = ""


# An engine: (setting, prompt, length limit) -> record.
Decode = Callable[[Setting, EvaluationPrompt, int], DecodingRecord]


def load_engine(models: Models, settings: Sequence[Setting]) -> Decode:
    """Load the models that the settings of one runtime need (baselines included), each once."""
    if any(s.path in RUNTIMES["server"] for s in settings):
        return _servers(models, settings[0].path)
    openvino = any(s.path in OPENVINO for s in settings)
    return (_OpenVINO if openvino else _PyTorch)(models, settings)


def _servers(models: Models, engine: str) -> Decode:
    from fastdraft_hf.eval.servers import CLIENTS

    # Both are asked now, so that a wrong URL is found before anything is timed.
    alone, assisted = (
        CLIENTS[engine](url, f"bench.{key}", models.stop_ids)
        for key, url in (("server_alone", models.server_alone), ("server", models.server))
    )

    def decode(setting: Setting, prompt: EvaluationPrompt, longest: int) -> DecodingRecord:
        server = assisted if setting.num_assistant_tokens else alone
        record = server.decode(prompt.task, prompt.key, prompt.ids, longest)
        record.num_assistant_tokens = setting.num_assistant_tokens
        return record

    return decode


def _ending(target: Any, stop_ids: list[int]) -> Any:
    """Return a target whose answers end at these tokens."""
    config = target.generation_config
    if stop_ids:
        config.eos_token_id = stop_ids
        if config.pad_token_id is None:
            config.pad_token_id = stop_ids[0]
    return target


def _fields(setting: Setting, prompt: EvaluationPrompt, longest: int) -> dict[str, Any]:
    """Return the arguments that all decoders share."""
    given = {"task": prompt.task, "key": prompt.key, "max_new_tokens": longest}
    return {**given, "num_assistant_tokens": setting.num_assistant_tokens}


class _PyTorch:
    def __init__(self, models: Models, settings: Sequence[Setting]) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        from fastdraft_hf.draft.reduced_vocabulary import load_draft, read_reduced_vocabulary

        # The usual type of each device: float32 has the fastest kernels of most CPUs.
        dtype = torch.bfloat16 if models.device == "cuda" else torch.float32

        def load(folder: str) -> Any:
            model = AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype, use_safetensors=True, trust_remote_code=False
            )
            return model.to(models.device).eval()

        self._target = _ending(load(models.target), models.stop_ids)
        paths = {s.path for s in settings}
        self._drafts: dict[str, Any] = {}
        if "ours" in paths:
            draft = load_draft(models.draft, dtype=dtype).to(models.device).eval()
            self._drafts["ours"] = draft
        if "transformers" in paths:  # reads the unreduced head
            same = "ours" in paths and read_reduced_vocabulary(models.draft) is None
            self._drafts["transformers"] = self._drafts["ours"] if same else load(models.draft)

    def __call__(self, setting: Setting, prompt: EvaluationPrompt, longest: int) -> DecodingRecord:
        from fastdraft_hf.decode.assisted import decode

        path: Any = "transformers" if setting.path == "alone" else setting.path
        draft = self._drafts.get(setting.path)
        given = _fields(setting, prompt, longest)
        # Stock decoding does not read what the loop may copy.
        given |= {"draft": draft, "path": path, "prompt_lookup_min": LOOKUP}
        return decode(self._target, prompt.ids, **given)


class _OpenVINO:
    """GenAI pipelines and ``OVModelForCausalLM``.

    A GenAI pipeline is made for one way of drafting and cannot decode without it, so there are as
    many pipelines with the target as there are ways, and optimum-intel's model beside them.
    Pipelines of one process share a model's weights if the plug-in maps them from the file.
    """

    def __init__(self, models: Models, settings: Sequence[Setting]) -> None:
        target, paths = Path(models.target_openvino), {s.path for s in settings}
        self._stop_ids = models.stop_ids
        self._pipelines: dict[str, Any] = {}
        for path in dict.fromkeys(s.path for s in settings if s.path.startswith("openvino")):
            from fastdraft_hf.decode.openvino.pipeline import OpenVINODecoder

            self._pipelines[path] = OpenVINODecoder(
                target,
                Path(models.draft_openvino) if path == "openvino" else None,
                prompt_lookup=path == "openvino-prompt-lookup",
            )
        if paths & {"ours-openvino", "ours-openvino-alone"}:
            from optimum.intel import OVModelForCausalLM

            from fastdraft_hf.decode.openvino.paged import paged

            # Without `export=False` optimum-intel asks the Hub about each folder.
            given = {"compile": False, "export": False}
            self.target = OVModelForCausalLM.from_pretrained(str(target), **given)
            _ending(self.target, self._stop_ids)
            # Paging drops the target's own compiled graph, once. Done here and not by the first
            # answer with a draft: the target alone would compile it again while it is timed.
            if "ours-openvino" in paths:
                paged(self.target)
                # The loop compiles what it runs; nobody calls a draft by itself.
                self._draft = OVModelForCausalLM.from_pretrained(models.draft_openvino, **given)

    def __call__(self, setting: Setting, prompt: EvaluationPrompt, longest: int) -> DecodingRecord:
        from fastdraft_hf.decode.assisted import decode

        record: DecodingRecord
        given = _fields(setting, prompt, longest)
        if setting.path in self._pipelines:
            pipeline = self._pipelines[setting.path]
            record = pipeline.decode(prompt.ids, stop_ids=set(self._stop_ids), **given)
            return record
        draft = self._draft if setting.path == "ours-openvino" else None
        given |= {"draft": draft, "path": "ours", "prompt_lookup_min": LOOKUP}
        record = decode(self.target, prompt.ids, **given)
        record.path = "ours-openvino"
        return record


def run_bench(
    models: Models,
    assisted: Sequence[Setting],
    prompts: Sequence[EvaluationPrompt],
    config: BenchConfig,
    folder: Path,
) -> dict[Setting, list[DecodingRecord]]:
    """Time the settings and their baselines; return their records, as `complete_records` does.

    ``folder`` keeps ``records.jsonl``; what it holds is not measured again. A time limit leaves out
    prompts, then the last values of γ and the last paths, then PyTorch. A runtime keeps every
    prompt that it had time for, so a fast one may have more of them than a slow one.
    """
    end = time.monotonic() + 60 * (config.max_minutes or math.inf)
    journal = Journal(folder / "records.jsonl")
    runtimes = {
        name: settings
        for name, paths in RUNTIMES.items()
        if (settings := all_settings([s for s in assisted if s.path in paths]))
    }
    timed: dict[Setting, list[DecodingRecord]] = {}
    for number, (name, settings) in enumerate(runtimes.items()):
        now = time.monotonic()  # each runtime gets an equal share of the time that is left
        if number and now > end:
            break
        deadline = now + (end - now) / (len(runtimes) - number)
        engine = load_engine(models, settings)
        kept = collect(name, engine, settings, prompts, config, journal, deadline)
        timed |= complete_records(journal, all_settings(kept), prompts)
        del engine
        gc.collect()  # before the next runtime loads its own models
        if models.device == "cuda":
            import torch

            torch.cuda.empty_cache()
    return timed


def collect(
    name: str,
    decode: Decode,
    settings: Sequence[Setting],
    prompts: Sequence[EvaluationPrompt],
    config: BenchConfig,
    journal: Journal,
    deadline: float = math.inf,
) -> list[Setting]:
    """Time every prompt in every setting, greedily; the settings take turns within a prompt.

    A drift of the machine's speed affects all settings alike. So does the position in the turn
    (caches, clock, heat): the order is reversed on every second prompt of a task set.

    Timings that ``journal`` has are not made again. No prompt is started that would end after
    ``deadline``, of ``time.monotonic``, but for the first. Settings are left out from the end if
    warming them up takes so long that one prompt would not fit, but for the first that drafts and
    what it is compared to. Return the settings that draft and were timed.
    """
    # An answer takes four warm-ups at most.
    last_warm_up = time.monotonic() + (deadline - time.monotonic()) / 5
    least = all_settings([s for s in settings if s.num_assistant_tokens][:1])
    tasks = list(dict.fromkeys(prompt.task for prompt in prompts))
    turns: list[tuple[EvaluationPrompt, dict[str, Setting]]] = []
    seen: Counter[str] = Counter()
    for prompt in prompts:
        number = seen[prompt.task]
        seen[prompt.task] += 1
        even = (number + tasks.index(prompt.task)) % 2 == 0
        labels = {s.label(prompt): s for s in settings[:: 1 if even else -1]}
        missing = {label: s for label, s in labels.items() if label not in journal}
        turns.append((prompt, missing))
    due = sum(len(missing) for _, missing in turns)
    warm = []
    for setting in settings if due else ():
        if setting in least or time.monotonic() < last_warm_up:
            decode(setting, prompts[0], min(_WARM_UP_TOKENS, config.max_new_tokens))  # not kept
            warm.append(setting)
    total = len(turns) * len(settings)
    with Progress(f"bench {name}", total, "answers", done=total - due) as progress:
        took = 0.0
        for number, (prompt, missing) in enumerate(turns):
            began = time.monotonic()
            if number and began + took > deadline:
                break
            for label in [label for label, setting in missing.items() if setting in warm]:
                journal.add(label, decode(missing[label], prompt, config.max_new_tokens))
                progress.advance(1)
            took = max(took, time.monotonic() - began)
    timed = [s for s in settings if s.label(prompts[0]) in journal]
    return [s for s in timed if s.num_assistant_tokens and s.baseline in timed]


def complete_records(
    journal: Journal, settings: Sequence[Setting], prompts: Sequence[EvaluationPrompt]
) -> dict[Setting, list[DecodingRecord]]:
    """Return the records of those prompts that were timed in every setting.

    All lists are in the same order, so that any two of them are pairs.
    """
    complete = [p for p in prompts if all(s.label(p) in journal for s in settings)]
    return {s: [journal[s.label(p)] for p in complete] for s in settings}
