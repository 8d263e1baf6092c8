"""Times rounds of our decoding loop: each pass of the draft, the target's, and what is between.

Rounds are real ones (`fastdraft_hf.decode.loop`), so a pass meets the caches of the CPU as it
will when decoding: isolated passes in a row find a small draft's weights still there and look
faster than they are. Drafts may be untrained; a round costs the same whatever it accepts, but for
the second token the draft reads after a block that was accepted whole, which is timed apart.
"""

from __future__ import annotations

import contextlib
import random
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from fastdraft_hf._errors import FastDraftError
from fastdraft_hf.tune.predict import RoundCost

if TYPE_CHECKING:
    from fastdraft_hf.decode.cached import CachedModel

# Pairs of one and two tokens that are timed for what catching up costs.
_CATCH_UPS = 4
# Drafts stay loaded between repeats while they take less than this, in bytes.
_KEPT_BYTES = 2 << 30


@dataclass(frozen=True)
class RoundTime:
    """One round.

    Attributes:
        gamma: tokens drafted.
        total: seconds from its end to the end of the round before.
        drafts: seconds of the draft's passes; empty where only the whole was timed.
        verify: seconds of the target's pass; 0 likewise.
    """

    gamma: int
    total: float
    drafts: tuple[float, ...] = ()
    verify: float = 0.0


@dataclass(frozen=True)
class Timing:
    """One repeat of one draft: its rounds, and pairs (one token, two tokens) of its passes."""

    rounds: tuple[RoundTime, ...]
    catch_ups: tuple[tuple[float, float], ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Timing:
        rounds = tuple(
            RoundTime(r["gamma"], r["total"], tuple(r["drafts"]), r["verify"])
            for r in data["rounds"]
        )
        return cls(rounds, tuple((one, two) for one, two in data["catch_ups"]))


class Timer(Protocol):
    """What the search times drafts with; tests give it one of their own."""

    def measure(self, draft: Path, repeat: int) -> Timing:
        """Time the rounds of one draft once."""


def median_and_quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the median and the quartiles around it."""
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return middle, low, high


def round_costs(timings: dict[str, list[Timing]], pooled: bool) -> dict[str, RoundCost]:
    """Return the parts of a round for every draft, as medians over its rounds.

    Args:
        timings: repeats by draft.
        pooled: take the target's passes and what is outside over the rounds of all drafts, on
            which they do not depend; not where a device works on while Python runs ahead.
    """
    parts = {name: _parts(repeats) for name, repeats in timings.items()}
    if pooled:
        gammas = list(next(iter(parts.values())).verify)
        verify = {g: _median([t for p in parts.values() for t in p.verify[g]]) for g in gammas}
        outside = {g: _median([t for p in parts.values() for t in p.outside[g]]) for g in gammas}
    costs = {}
    for name, part in parts.items():
        if not pooled:
            verify = {g: _median(times) for g, times in part.verify.items()}
            outside = {g: _median(times) for g, times in part.outside.items()}
        # The next passes' share of γ = 1, which has none, is nothing.
        following = _median(part.next) if part.next else _median(part.first)
        catch_up = max(0.0, _median(part.catch_up)) if part.catch_up else 0.0
        costs[name] = RoundCost(_median(part.first), following, catch_up, verify, outside)
    return costs


@dataclass
class _Parts:
    first: list[float]
    next: list[float]
    catch_up: list[float]
    verify: dict[int, list[float]]
    outside: dict[int, list[float]]


def _parts(repeats: list[Timing]) -> _Parts:
    rounds = [r for timing in repeats for r in timing.rounds]
    known = [r for r in rounds if r.drafts]
    free = [r for r in rounds if not r.drafts]
    found = _Parts(
        first=[r.drafts[0] for r in known],
        next=[t for r in known for t in r.drafts[1:]],
        catch_up=[two - one for timing in repeats for one, two in timing.catch_ups],
        verify={},
        outside={},
    )
    for gamma in sorted({r.gamma for r in known}):
        here = [r for r in known if r.gamma == gamma]
        found.verify[gamma] = [r.verify for r in here]
        passes = [sum(r.drafts) + r.verify for r in here]
        # Where passes were only told apart by waiting for each, whole rounds were timed freely.
        wholes = [r.total for r in free if r.gamma == gamma]
        if wholes:
            found.outside[gamma] = [_median(wholes) - _median(passes)]
        else:
            found.outside[gamma] = [r.total - p for r, p in zip(here, passes, strict=True)]
    return found


def _median(values: Sequence[float]) -> float:
    return float(statistics.median(values))


class _EnoughError(Exception):
    """Ends a loop from the inside; not an error."""


class LoopTimer:
    """Times drafts in our loop beside one target.

    Args:
        target: the target's folder; OpenVINO's for ``openvino``.
        measure: cpu, cuda or openvino.
        gammas: the γ that are timed, one after the other.
        context: tokens in the caches at the start.
        rounds: rounds of each γ that are kept; one more warms up.
        seed: draws the prompt.
        threads: of PyTorch; ``None`` leaves them.
        keep: whether drafts stay in memory between repeats.

    Raises:
        FastDraftError: there is no such device.
    """

    def __init__(
        self,
        target: Path,
        measure: str,
        gammas: Sequence[int],
        context: int,
        rounds: int,
        seed: int = 0,
        threads: int | None = None,
        keep: bool = True,
    ) -> None:
        import torch

        if measure == "cuda" and not torch.cuda.is_available():
            raise FastDraftError("measure: cuda, but PyTorch finds no GPU here")
        self._before = torch.get_num_threads()
        if threads is not None:
            torch.set_num_threads(threads)
        self._measure, self._gammas, self._rounds = measure, list(gammas), rounds
        self._keep = keep
        self._loaded: dict[Path, Any] = {}
        self._target = self._load(target)
        vocabulary = self._target.config.get_text_config().vocab_size
        rng = random.Random(seed)
        self._prompt = [rng.randrange(vocabulary) for _ in range(context)]

    def measure(self, draft: Path, repeat: int) -> Timing:
        """Time ``rounds`` rounds of every γ with a draft.

        Args:
            draft: its folder.
            repeat: number of the repeat; every second one goes through the γ backwards, and on a
                GPU only times whole rounds, since waiting for each pass slows them down.
        """
        import torch

        from fastdraft_hf.decode.speculative import one_torch_thread

        model = self._loaded.get(draft) or self._load(draft)
        if self._keep:
            self._loaded[draft] = model
        apart = self._measure != "cuda" or repeat % 2 == 0
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.inference_mode())
            if self._measure == "openvino":
                stack.enter_context(one_torch_thread())  # as decoding does
            return self._rounds_of(model, repeat, apart)

    def _load(self, folder: Path) -> Any:
        if self._measure == "openvino":
            from optimum.intel import OVModelForCausalLM

            # The loop compiles what it runs.
            return OVModelForCausalLM.from_pretrained(folder, compile=False)
        import torch

        from fastdraft_hf.draft.reduced_vocabulary import load_draft

        cuda = self._measure == "cuda"
        model = load_draft(folder, dtype=torch.bfloat16 if cuda else torch.float32)
        return model.to(self._measure).eval()

    def _cached(self, model: Any) -> CachedModel:
        if self._measure == "openvino":
            from fastdraft_hf.decode.openvino.stateful import open_openvino

            return open_openvino(model)
        import torch
        from transformers import DynamicCache

        from fastdraft_hf.decode.cached import TorchModel

        ids = getattr(model, "head_token_ids", None)
        ids = None if ids is None else torch.as_tensor(ids, device=model.device)
        return TorchModel(model, DynamicCache(), token_ids=ids)

    def _rounds_of(self, model: Any, repeat: int, apart: bool) -> Timing:
        import torch

        from fastdraft_hf.decode.loop import Drafting, Loop
        from fastdraft_hf.decode.scores import Scores
        from fastdraft_hf.decode.text import Stops, Text

        target, draft = self._cached(self._target), self._cached(model)
        ids = torch.tensor([self._prompt], device=target.device)
        positions = torch.arange(len(self._prompt), device=target.device)[None]
        order = self._gammas if repeat % 2 == 0 else self._gammas[::-1]
        # One γ after the other: OpenVINO prepares a pass anew where it is of another width than
        # the last, which took 4 ms of the embedded target's 13; decoding keeps to one.
        plan = [gamma for gamma in order for _ in range(self._rounds + 1)]
        drafting = Drafting(plan[0])
        found: list[RoundTime] = []
        spent: dict[str, list[float]] = {"draft": [], "target": []}
        last = 0.0
        told = -1  # the first round reads the prompt

        def report(row: int, drafted: int, accepted: int) -> None:
            nonlocal last, told
            now = time.perf_counter()
            if told >= 0:
                (verify,) = spent["target"] or (0.0,)
                drafts = tuple(spent["draft"])
                found.append(RoundTime(drafted, now - last, drafts, verify))
            told += 1
            for times in spent.values():
                times.clear()
            if told == len(plan):
                raise _EnoughError
            drafting.num_assistant_tokens = plan[told]
            last = time.perf_counter()

        loop = Loop(
            target=target,
            draft=draft,
            text=Text(ids, None, positions, 0),
            scores=Scores([], self._target.config.get_text_config().vocab_size),
            stops=Stops(max_length=1 << 30),
            drafting=drafting,
            sampling=False,
            report=report,
        )
        with contextlib.suppress(_EnoughError), contextlib.ExitStack() as stack:
            if apart:
                stack.enter_context(_timed(draft, spent["draft"]))
                stack.enter_context(_timed(target, spent["target"]))
            loop.run()
        if apart and any(len(r.drafts) != r.gamma for r in found):
            raise RuntimeError("the loop's passes of the draft are not one a drafted token")
        kept = [r for number, r in enumerate(found) if number % (self._rounds + 1)]
        return Timing(tuple(kept), tuple(self._catch_ups(draft)))

    def _catch_ups(self, draft: CachedModel) -> Iterator[tuple[float, float]]:
        """Feed one and two tokens in turn."""
        import torch

        for number in range(_CATCH_UPS + 1):
            pair = []
            for width in (1, 2):
                tokens = torch.tensor([self._prompt[:width]], device=draft.device)
                positions = torch.arange(draft.slots, draft.slots + width, device=draft.device)
                spent: list[float] = []
                with _timed(draft, spent):
                    draft.feed(tokens, positions[None], None, 1)
                pair.append(spent[0])
            if number:  # the first warms up
                yield pair[0], pair[1]


@contextlib.contextmanager
def _timed(model: CachedModel, spent: list[float]) -> Iterator[None]:
    """Collect the seconds of a model's passes, waiting for its GPU."""
    import torch

    feed = model.feed
    cuda = model.device.type == "cuda"

    def timed(*args: Any, **kwargs: Any) -> Any:
        if cuda:
            torch.cuda.synchronize(model.device)
        start = time.perf_counter()
        logits = feed(*args, **kwargs)
        if cuda:
            torch.cuda.synchronize(model.device)
        spent.append(time.perf_counter() - start)
        return logits

    vars(model)["feed"] = timed
    try:
        yield
    finally:
        del vars(model)["feed"]


def keeps_drafts(params: int, designs: int, measure: str) -> bool:
    """Return whether all drafts fit beside one another into the memory set aside for them."""
    size = {"cpu": 4, "cuda": 2, "openvino": 2}[measure]
    return params * designs * size < _KEPT_BYTES
