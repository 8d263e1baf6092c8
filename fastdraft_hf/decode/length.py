"""How long a block pays: draft another token only while its expected gain is worth its time.

A round is a renewal, so the best rule compares with the rate of the best rounds (optimal stopping).
Let S be the probability that the k tokens drafted so far are all accepted, p the acceptance of a
token after accepted ones, t_d the seconds of a step of the draft, t_v(n) those of the target's pass
over n drafts, and R the tokens per second of the best constant length, 1/t_v(0) without drafts.
Drafting goes on if for some m

    S (p + p² + … + p^m) > R (m t_d + t_v(k + m) - t_v(k)).

Times and acceptance are those of earlier rounds, and S is known before the next token is drawn. So
the decision depends on nothing that is verified later, and the text is the target's.
"""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter
from typing import Any
from weakref import WeakKeyDictionary

# Most tokens per round.
LONGEST = 10
# Tokens whose probability under the draft is in the same sixth share an estimate of acceptance.
_BINS = 6
# Rounds without drafts before a probe; twice as many after each that fails, up to `_RARELY`.
_SOON, _RARELY = 8, 64


class _Mean:
    """An acceptance rate whose last ``memory`` observations count; it starts at ``prior``."""

    def __init__(self, prior: float, memory: int) -> None:
        self.value, self.weight, self._memory = prior, 4.0, memory

    def add(self, accepted: bool) -> None:
        self.weight = self.weight * (1 - 1 / self._memory) + 1
        self.value += (accepted - self.value) / self.weight


class _Seconds:
    """Seconds of a pass over n drafts as a line a + b·n through the last passes, about 32."""

    def __init__(self) -> None:
        self.weight = self._n = self._t = self._nn = self._nt = self._slope = 0.0
        self._seen: set[int] = set()

    def add(self, n: int, seconds: float) -> None:
        if n not in self._seen:  # compiles, allocates, chooses kernels
            self._seen.add(n)
            return
        if self.weight > 2:
            seconds = min(seconds, 2 * self(n))
        new = (1.0, n, seconds, n * n, n * seconds)
        old = (self.weight, self._n, self._t, self._nn, self._nt)
        # Means, so that the weight alone grows.
        weight = self.weight * (1 - 1 / 32) + 1
        means = [o + (x - o) / weight for o, x in zip(old[1:], new[1:], strict=True)]
        self.weight, (self._n, self._t, self._nn, self._nt) = weight, means
        spread = self._nn - self._n**2
        if spread > 0.1:
            slope = (self._nt - self._n * self._t) / spread
            # A pass over n drafts reads n + 1 tokens and takes at most that many times as long.
            self._slope = min(max(0.0, slope), self._t / (self._n + 1))

    def __call__(self, n: int) -> float:
        return self._t + self._slope * (n - self._n)


class Learned:
    """Times and acceptance of a pair, from all its calls. Threads may share it."""

    def __init__(self) -> None:
        self.target, self.draft = _Seconds(), _Seconds()
        self.bins = [_Mean((b + 0.5) / _BINS, 400) for b in range(_BINS)]
        self.next = _Mean(0.5, 40)


class DraftLength:
    """The rule during one call.

    Attributes:
        most: tokens to draft at most in this round; 0 where drafting does not pay.
    """

    def __init__(self, learned: Learned) -> None:
        self.most, self._best = 0, 0.0  # R
        self._target, self._draft = learned.target, learned.draft
        self._bins, self._next = learned.bins, learned.next
        # Another text: what the last one taught about acceptance counts less.
        self._next.weight = min(self._next.weight, 8.0)
        self._idle, self._wait, self._probing = 0, _SOON, False
        self._reads_prompt = self._draft_is_behind = True

    def begin(self, rows: int) -> None:
        """Begin a round."""
        self._clock = perf_counter()
        self._stakes = [1.0] * rows
        self._chances: list[Sequence[float]] = []
        self.most = self._longest()

    def _longest(self) -> int:
        if self._target.weight < 2:
            return 0
        if not self._draft.weight:
            return 2
        pays = self._rate()
        self._idle = 0 if pays else self._idle + 1
        self._probing = self._idle >= self._wait
        return LONGEST if pays or self._probing else 0

    def _rate(self) -> bool:
        """Set R; return whether drafting gives it."""
        self._best, pays = 1 / self._target(0), False
        tokens = share = 1.0
        for count in range(1, LONGEST + 1):
            share *= self._next.value
            tokens += share
            rate = tokens / (count * self._draft(1) + self._target(count))
            if rate > self._best:
                self._best, pays = rate, True
        return pays

    def drafted(self, chances: Sequence[float]) -> None:
        """Note the draft's probability of the token that it chose, in each row."""
        now = perf_counter()
        if not self._draft_is_behind:
            self._draft.add(1, now - self._clock)
        self._clock, self._draft_is_behind = now, False
        self._chances.append(chances)
        for row, chance in enumerate(chances):
            self._stakes[row] *= self._bin(chance).value

    def pays(self, still: Sequence[bool]) -> bool:
        """Return whether to draft another token; ``still`` are the rows that can."""
        drafted = len(self._chances)
        gain = 0.0
        expected = sum(s for s, goes_on in zip(self._stakes, still, strict=True) if goes_on)
        expected /= len(still)
        before, step = self._target(drafted), self._draft(1)
        for more in range(1, LONGEST + 1 - drafted):
            expected *= self._next.value
            gain += expected
            if gain > self._best * (more * step + self._target(drafted + more) - before):
                return True
        return False

    def end(self, drafted: int, outcomes: Sequence[tuple[int, int, bool]]) -> None:
        """Learn from a round.

        Args:
            drafted: tokens that the target read beside its own.
            outcomes: for each row (emitted, drafts that counted, ended).
        """
        if not self._reads_prompt:
            self._target.add(drafted, perf_counter() - self._clock)
        self._reads_prompt, self._draft_is_behind = False, not drafted
        for row, (emitted, limit, ended) in enumerate(outcomes):
            # A stop cuts what may have been accepted.
            for position in range(min(limit, emitted - 1 if ended else emitted)):
                accepted = position < emitted - 1
                self._bin(self._chances[position][row]).add(accepted)
                self._next.add(accepted)
        if self._probing and drafted:
            hit = any(emitted > 1 for emitted, _, _ in outcomes)
            # What is accepted nearly always and does not pay never will.
            promising = hit and self._next.value < 0.9
            self._wait = max(1, self._wait // 4) if promising else min(_RARELY, 2 * self._wait)
            self._idle = 0
            self._next.weight = min(self._next.weight, 8.0)

    def _bin(self, chance: float) -> _Mean:
        return self._bins[min(_BINS - 1, int(chance * _BINS))]


# target -> draft -> (rows, sampling) -> what their calls taught
_learned: WeakKeyDictionary[Any, WeakKeyDictionary[Any, dict[tuple[int, bool], Learned]]]
_learned = WeakKeyDictionary()


def draft_length(target: Any, draft: Any, rows: int, sampling: bool) -> DraftLength:
    """Return the rule for a call, with what earlier calls of the pair taught."""
    of_pair = _learned.setdefault(target, WeakKeyDictionary()).setdefault(draft, {})
    return DraftLength(of_pair.setdefault((rows, sampling), Learned()))
