"""One progress display for every stage: a bar in a terminal, a line now and then in a log."""

import sys

from tqdm import tqdm

from fastdraft_hf._processes import is_main

# How often a log gets a line.
LOG_SECONDS = 15.0
_LINE = "{desc}: {n_fmt}/{total_fmt} {unit}, {rate_fmt}, {remaining} left{postfix}"


class Progress(tqdm):
    """Shows how far a piece of work is, its rate and its remaining time, in the main process.

    Args:
        label: the work.
        total: its amount in ``unit``; ``None`` if it is unknown.
        unit: what is counted (``"tokens"``, ``"prompts"``).
        done: the amount that an earlier run did; it does not count towards the rate.
    """

    def __init__(self, label: str, total: float | None, unit: str, done: float = 0) -> None:
        self._log = not sys.stderr.isatty()
        super().__init__(
            desc=label,
            total=total,
            initial=done,
            unit=unit,
            disable=not is_main(),
            dynamic_ncols=True,
            smoothing=0,  # the mean rate of the whole run
            miniters=0,
            mininterval=LOG_SECONDS if self._log else 0.1,
            delay=1e-9 if self._log else 0,  # no line before the first work
            bar_format=_LINE if self._log else None,
            leave=not self._log,
        )

    def advance(self, amount: float = 1, note: str | None = None) -> None:
        """Count ``amount`` more; ``note`` replaces the text at the end of the line."""
        if note is not None:
            self.set_postfix_str(note, refresh=False)
        self.update(amount)

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Draw the bar, or print a line of a log; the name is tqdm's."""
        if not self._log:
            super().display(msg, pos)
        elif msg is None:
            print(self, file=sys.stderr, flush=True)

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if self._log and not self.disable and kind is None:
            self.display()
        self.close()
