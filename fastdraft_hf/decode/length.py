"""How long a block pays, the schedule ``cost``; docs/decoding.md derives the rule.

The decision depends on the tokens drafted so far and on earlier rounds, never on what is verified
later, so the text is the target's.
"""

import math
from collections.abc import Iterable, Sequence
from time import perf_counter
from typing import Any
from weakref import WeakKeyDictionary

LONGEST = 10  # tokens per round
# Tokens whose probability under the draft is in the same sixth share an estimate of acceptance.
_BINS = 6
# Rounds without drafts before the draft looks back; twice as many after each time that drafting
# still would not pay, up to `_RARELY`.
_SOON, _RARELY = 8, 64
# Rounds over which a constant length has to earn what the change of shape costs.
_KEPT = 8
# Step of a text's own shift of acceptance, in log-odds.
_STEP = 0.3


class _Mean:
    """A mean of about the last ``memory`` observations, beside ``weight`` of ``value``."""

    def __init__(self, value: float, weight: float, memory: int) -> None:
        self.value, self.weight, self._memory = value, weight, memory

    def add(self, new: float) -> None:
        self.weight = self.weight * (1 - 1 / self._memory) + 1
        self.value += (new - self.value) / self.weight


class _Seconds:
    """Seconds of a pass over n drafts: a line through about the last 32, times a ratio of n itself.

    The ratio counts the more, the more passes it is of: four tokens may take less than three.
    ``change`` is what a pass takes longer after one over another number of tokens: OpenVINO
    prepares its graph again.
    """

    def __init__(self) -> None:
        self.weight = self._base = self._slope = 0.0
        self._sums = [0.0] * 5
        self._change = _Mean(0.0, 2, 32)
        self._own: dict[int, _Mean] = {}

    @property
    def change(self) -> float:
        return max(0.0, self._change.value)

    def add(self, n: int, seconds: float, changed: bool = False) -> None:
        if n not in self._own:  # compiles, allocates, chooses kernels
            self._own[n] = _Mean(1.0, 2, 16)
            return
        if self.weight > 2:
            # More is something else on the machine.
            seconds = min(seconds, 2 * (self(n) + self.change))
        if changed and self.weight:
            self._change.add(seconds - self(n))
            seconds = max(seconds - self.change, seconds / 2)  # never below 0
        new = (1, n, seconds, n * n, n * seconds)
        self._sums = [old * (1 - 1 / 32) + x for old, x in zip(self._sums, new, strict=True)]
        self.weight = self._sums[0]
        mean, time, squares, products = (x / self.weight for x in self._sums[1:])
        # Flatter where n hardly varies: as if one more pass, half a token off, took the mean time.
        self._slope = (products - mean * time) / (squares - mean**2 + 0.25 / self.weight)
        # It reads n + 1 tokens and takes at most that many times as long.
        self._slope = min(max(0.0, self._slope), time / (mean + 1))
        self._base = time - self._slope * mean
        if not changed:
            # A ratio, so that the times of all n follow where the machine becomes slower.
            self._own[n].add(min(2.0, seconds / (self._base + self._slope * n)))

    def __call__(self, n: int) -> float:
        own = self._own.get(n)
        return (self._base + self._slope * n) * (1.0 if own is None else own.value)


class Learned:
    """Times and acceptance of a pair, from all its calls. Threads may share it."""

    def __init__(self) -> None:
        self.target, self.draft = _Seconds(), _Seconds()
        # Acceptance: of tokens by their probability under the draft, and of all.
        self.bins = [_Mean((b + 0.5) / _BINS, 4, 400) for b in range(_BINS)]
        self.next = _Mean(0.5, 4, 40)

    def bin(self, chance: float) -> _Mean:
        return self.bins[min(_BINS - 1, int(chance * _BINS))]


class DraftLength:
    """The rule during one call.

    ``most`` is how many tokens a round may draft, and ``copies`` how many a row copies if it can.
    """

    def __init__(self, learned: Learned) -> None:
        self._learned = learned
        self._forget()  # another text
        self._shift = 0.0  # of its acceptance from that of the bins, in log-odds
        # Acceptance of what this text copies; so high at first that copies are tried.
        self._copied = _Mean(max(0.6, learned.next.value), 4, 40)
        self.most, self.copies, self._rate = 0, 0, 0.0
        self._last = -1  # drafts of the last round; of the prompt, another number than any
        self.idle = 0  # rounds without drafts since the draft last read the text
        self._wait = _SOON  # of these before the draft looks back
        self._reads_prompt = self._draft_is_behind = True

    @property
    def looks_back(self) -> bool:
        """Whether the draft should read now what the target has written alone."""
        return self.idle >= self._wait

    def _forget(self) -> None:
        """Let what was learned about acceptance count less."""
        self._learned.next.weight = min(self._learned.next.weight, 4.0)

    def looked_back(self, accepted: Iterable[float]) -> None:
        """Note the acceptance that each token drafted there would have had."""
        self._forget()
        for one in accepted:
            self._learned.next.add(one)
        self._wait = min(_RARELY, 2 * self._wait)
        self.idle = 0

    def begin(self, rows: int) -> None:
        """Begin a round."""
        self._clock = perf_counter()
        self._stakes, self._chances = [1.0] * rows, list[Sequence[float]]()
        target, draft = self._learned.target, self._learned.draft
        if target.weight < 2 or not draft.weight:
            self.most = 2 if target.weight >= 2 else 0
            return
        rates = self._rates(self._learned.next.value, draft(1))
        self._rate = max(rates)
        self.most = LONGEST if self._rate > rates[0] else 0
        if self.most:
            self._wait = _SOON
        copying = self._rates(self._copied.value, 0.0)
        self.copies = copying.index(max(copying)) if max(copying) > self._rate else 0

    def _rates(self, acceptance: float, step: float) -> list[float]:
        """Return the tokens per second of rounds of 0 to `LONGEST` tokens that take ``step``."""
        tokens = share = 1.0
        rates = [1 / self._verifies(0, _KEPT)]
        for count in range(1, LONGEST + 1):
            share *= acceptance
            tokens += share
            rates.append(tokens / (count * step + self._verifies(count, _KEPT)))
        return rates

    def _verifies(self, drafts: int, rounds: int = 1) -> float:
        """Return the target's seconds, with a change of shape that serves so many rounds."""
        target = self._learned.target
        return target(drafts) + (drafts != self._last) * target.change / rounds

    def _acceptance(self, chance: float) -> float:
        """Return how often, in this text, a token of this probability is accepted."""
        usual = min(max(self._learned.bin(chance).value, 0.01), 0.99)
        return 1 / (1 + (1 / usual - 1) * math.exp(-self._shift))

    def drafted(self, chances: Sequence[float]) -> None:
        """Note the draft's probability of the token that it chose, in each row."""
        now = perf_counter()
        if not self._draft_is_behind:
            self._learned.draft.add(1, now - self._clock)
        self._clock, self._draft_is_behind = now, False
        self._chances.append(chances)
        chosen = zip(self._stakes, chances, strict=True)
        self._stakes = [stake * self._acceptance(chance) for stake, chance in chosen]

    def pays(self, still: Sequence[bool]) -> bool:
        """Return whether to draft another token; ``still`` are the rows that can."""
        step, drafted = self._learned.draft(1), len(self._chances)
        expected = sum(s for s, can in zip(self._stakes, still, strict=True) if can) / len(still)
        gain, so_far = 0.0, self._verifies(drafted)
        for more in range(1, LONGEST + 1 - drafted):
            expected *= self._learned.next.value
            gain += expected
            if gain > self._rate * (more * step + self._verifies(drafted + more) - so_far):
                return True
        return False

    def end(
        self,
        drafted: int,
        outcomes: Sequence[tuple[int, int, bool]],
        copied: Sequence[Sequence[int]],
    ) -> None:
        """Learn from a round: rows are (emitted, drafts that counted, ended).

        ``copied`` are the first drafts of each row, those that it copied.
        """
        if not self._reads_prompt:
            seconds = perf_counter() - self._clock
            self._learned.target.add(drafted, seconds, drafted != self._last)
            self._last = drafted
        self._reads_prompt, self._draft_is_behind = False, not self._chances
        self.idle = 0 if drafted else self.idle + 1
        for row, (emitted, limit, ended) in enumerate(outcomes):
            # A stop cuts what may have been accepted.
            for position in range(min(limit, emitted - 1 if ended else emitted)):
                accepted = position < emitted - 1
                if position < len(copied[row]):
                    self._copied.add(accepted)
                    continue
                chance = self._chances[position][row]
                self._shift += _STEP * (accepted - self._acceptance(chance))
                self._learned.bin(chance).add(accepted)
                self._learned.next.add(accepted)


# target -> draft -> (rows, sampling) -> what their calls taught
_learned: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()


def draft_length(target: Any, draft: Any, rows: int, sampling: bool) -> DraftLength:
    """Return the rule for a call, with what earlier calls of the pair taught."""
    of_pair = _learned.setdefault(target, WeakKeyDictionary[Any, Any]()).setdefault(draft, {})
    return DraftLength(of_pair.setdefault((rows, sampling), Learned()))
