"""How long a block pays, the schedule ``cost``; docs/decoding.md derives the rule.

The decision depends on the tokens drafted so far and on earlier rounds, never on what is verified
later, so the text is the target's.
"""

from collections.abc import Sequence
from time import perf_counter
from typing import Any
from weakref import WeakKeyDictionary

LONGEST = 10  # tokens per round
# Tokens whose probability under the draft is in the same sixth share an estimate of acceptance.
_BINS = 6
# Rounds without drafts before a probe; twice as many after each that fails, up to `_RARELY`. A new
# text begins with half of what the last one needed.
_SOON, _RARELY = 8, 64


class _Acceptance:
    """An acceptance rate whose last ``memory`` observations count, beside four of ``prior``."""

    def __init__(self, prior: float, memory: int) -> None:
        self.value, self.weight, self._memory = prior, 4.0, memory

    def add(self, accepted: bool) -> None:
        self.weight = self.weight * (1 - 1 / self._memory) + 1
        self.value += (accepted - self.value) / self.weight


class _Seconds:
    """Seconds of a pass over n drafts: a line through about the last 32 passes."""

    def __init__(self) -> None:
        self.weight = self._base = self._slope = 0.0
        self._sums, self._seen = [0.0] * 5, set[int]()

    def add(self, n: int, seconds: float) -> None:
        if n not in self._seen:  # compiles, allocates, chooses kernels
            self._seen.add(n)
            return
        if self.weight > 2:
            seconds = min(seconds, 2 * self(n))  # something else on the machine
        new = (1, n, seconds, n * n, n * seconds)
        self._sums = [old * (1 - 1 / 32) + x for old, x in zip(self._sums, new, strict=True)]
        self.weight = self._sums[0]
        mean, time, squares, products = (s / self.weight for s in self._sums[1:])
        if (spread := squares - mean**2) > 0.1:
            self._slope = (products - mean * time) / spread
        # It reads n + 1 tokens and takes at most that many times as long.
        self._slope = min(max(0.0, self._slope), time / (mean + 1))
        self._base = time - self._slope * mean

    def __call__(self, n: int) -> float:
        return self._base + self._slope * n


class Learned:
    """Times and acceptance of a pair, from all its calls. Threads may share it."""

    def __init__(self) -> None:
        self.target, self.draft = _Seconds(), _Seconds()
        self.bins = [_Acceptance((b + 0.5) / _BINS, 400) for b in range(_BINS)]
        self.next = _Acceptance(0.5, 40)
        self.wait = _SOON  # rounds without drafts before the next probe

    def bin(self, chance: float) -> _Acceptance:
        return self.bins[min(_BINS - 1, int(chance * _BINS))]


class DraftLength:
    """The rule during one call; ``most`` is how many tokens a round may draft."""

    def __init__(self, learned: Learned) -> None:
        self._learned = learned
        # Another text: what the last one taught about acceptance counts less.
        learned.next.weight = min(learned.next.weight, 8.0)
        learned.wait = max(_SOON, learned.wait // 2)
        self.most, self._rate, self._idle = 0, 0.0, 0
        self._reads_prompt = self._draft_is_behind = True

    def begin(self, rows: int) -> None:
        """Begin a round."""
        self._clock = perf_counter()
        self._stakes, self._chances = [1.0] * rows, list[Sequence[float]]()
        target, draft = self._learned.target, self._learned.draft
        if target.weight < 2 or not draft.weight:
            self.most = 2 if target.weight >= 2 else 0
            return
        alone = self._rate = 1 / target(0)
        tokens = share = 1.0
        for count in range(1, LONGEST + 1):
            share *= self._learned.next.value
            tokens += share
            self._rate = max(self._rate, tokens / (count * draft(1) + target(count)))
        self._idle = 0 if self._rate > alone else self._idle + 1
        self.most = 0 if 0 < self._idle < self._learned.wait else LONGEST

    def drafted(self, chances: Sequence[float]) -> None:
        """Note the draft's probability of the token that it chose, in each row."""
        now = perf_counter()
        if not self._draft_is_behind:
            self._learned.draft.add(1, now - self._clock)
        self._clock, self._draft_is_behind = now, False
        self._chances.append(chances)
        chosen = zip(self._stakes, chances, strict=True)
        self._stakes = [stake * self._learned.bin(chance).value for stake, chance in chosen]

    def pays(self, still: Sequence[bool]) -> bool:
        """Return whether to draft another token; ``still`` are the rows that can."""
        target, step, drafted = self._learned.target, self._learned.draft(1), len(self._chances)
        expected = sum(s for s, can in zip(self._stakes, still, strict=True) if can) / len(still)
        gain = 0.0
        for more in range(1, LONGEST + 1 - drafted):
            expected *= self._learned.next.value
            gain += expected
            if gain > self._rate * (more * step + target(drafted + more) - target(drafted)):
                return True
        return False

    def end(self, drafted: int, outcomes: Sequence[tuple[int, int, bool]]) -> None:
        """Learn from a round: rows are (emitted, drafts that counted, ended)."""
        if not self._reads_prompt:
            self._learned.target.add(drafted, perf_counter() - self._clock)
        self._reads_prompt, self._draft_is_behind = False, not drafted
        for row, (emitted, limit, ended) in enumerate(outcomes):
            # A stop cuts what may have been accepted.
            for position in range(min(limit, emitted - 1 if ended else emitted)):
                accepted = position < emitted - 1
                self._learned.bin(self._chances[position][row]).add(accepted)
                self._learned.next.add(accepted)
        if self._idle and self.most:  # a probe
            # What is accepted nearly always and does not pay never will.
            sooner = self._learned.next.value < 0.9 and any(one[0] > 1 for one in outcomes)
            wait = self._learned.wait
            self._learned.wait = max(1, wait // 4) if sooner else min(_RARELY, 2 * wait)
            self._idle = 0
            self._learned.next.weight = min(self._learned.next.weight, 8.0)


# target -> draft -> (rows, sampling) -> what their calls taught
_learned: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()


def draft_length(target: Any, draft: Any, rows: int, sampling: bool) -> DraftLength:
    """Return the rule for a call, with what earlier calls of the pair taught."""
    of_pair = _learned.setdefault(target, WeakKeyDictionary[Any, Any]()).setdefault(draft, {})
    return DraftLength(of_pair.setdefault((rows, sampling), Learned()))
