"""Runs a demonstration: every prompt by the target alone, then with the draft, and what it gave."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fastdraft_hf._sequences import first_difference
from fastdraft_hf.decode.live import LiveText
from fastdraft_hf.decode.records import DecodingRecord
from fastdraft_hf.eval.demo.config import DemoConfig
from fastdraft_hf.eval.demo.engine import Engine
from fastdraft_hf.eval.demo.prompts import DemoPrompt
from fastdraft_hf.eval.demo.view import ALONE, WITH_DRAFT, Pane, frame, visible
from fastdraft_hf.eval.metrics import acceptance_rate, block_efficiency, tokens_per_second

if TYPE_CHECKING:
    from rich.console import Console

# Seconds between two drawings of the terminal.
_FRAME_SECONDS = 0.1
_WARM_UP_TOKENS = 16


@dataclass
class Comparison:
    """One prompt answered twice.

    Attributes:
        alone, assisted: what was measured.
        pieces: the assisted answer, token by token.
        parted: place of the first token at which two greedy answers differ; ``None`` when they
            are the same, or were sampled.
        margin: how far the target's first choice lay above its second there, in logits.
    """

    alone: DecodingRecord
    assisted: DecodingRecord
    pieces: LiveText
    parted: int | None = None
    margin: float | None = None


def figures(comparisons: Sequence[Comparison]) -> str:
    """Return acceptance and speed of some comparisons as one line."""
    alone = [c.alone for c in comparisons]
    assisted = [c.assisted for c in comparisons]
    before, after = tokens_per_second(alone), tokens_per_second(assisted)
    ratio = f"{after / before:.2f}x" if before else "no ratio"
    return (
        f"acceptance rate {acceptance_rate(assisted):.2f}, block efficiency "
        f"{block_efficiency(assisted):.2f}, {before:.1f} tokens/s alone, {after:.1f} with the "
        f"draft: {ratio}"
    )


def agreement(comparisons: Sequence[Comparison]) -> str:
    """Say whether the answers are the same, and where they part."""
    if any(c.alone.temperature for c in comparisons):
        return "sampled: the same distribution, so not the same text"
    if len(comparisons) == 1:
        found = comparisons[0]
        if found.parted is None:
            return f"outputs identical ({found.alone.new_tokens} tokens)"
        words = f"outputs part at token {found.parted + 1}"
        if found.margin is not None:
            words += (
                f", where the target's first choice is {found.margin:.3g} above its second (logits)"
            )
        return words
    same = sum(c.parted is None for c in comparisons)
    return f"outputs identical on {same} of {len(comparisons)} prompts"


def show(
    engine: Engine, prompts: Sequence[DemoPrompt], config: DemoConfig, console: Console
) -> list[Comparison]:
    """Answer every prompt twice, drawing while it is written where ``console`` is a terminal.

    Elsewhere the answers are printed as plain text. The two sides run one after the other: they
    would share the processor's cores.

    Args:
        engine: of `load_engine`.
        prompts: what is answered.
        config: the demonstration's.
        console: where to.

    Raises:
        FastDraftError: a prompt is empty.
    """
    read = [prompt.ids(engine.tokenizer, config.chat) for prompt in prompts]
    gamma = engine.num_assistant_tokens
    how = f"T = {config.temperature:g}" if config.temperature else "greedy"
    _say(console, f"{engine.title}, {how}, {gamma} tokens drafted a round")
    # Compilation, the page cache and first allocations belong to neither side.
    longest = max(read, key=len)
    for with_draft in (False, True):
        engine.answer(
            longest, config, key="warm-up", with_draft=with_draft, max_new_tokens=_WARM_UP_TOKENS
        )
    found = []
    for number, (prompt, ids) in enumerate(zip(prompts, read, strict=True), 1):
        heading = f"{number} of {len(prompts)}, {prompt.name}"
        found.append(_compare(engine, prompt, ids, config, console, heading))
        _say(console, figures(found[-1:]))
        _say(console, agreement(found[-1:]))
        _say(console, "")
    if len(found) > 1:
        _say(console, f"all {len(found)} prompts: {figures(found)}; {agreement(found)}")
    _say(console, "One run of each, without intervals: `fastdraft bench` measures with them.")
    if engine.title.startswith("transformers"):
        _say(
            console,
            "Through PyTorch a part of the ratio is the loop's and not the draft's (docs/demo.md).",
        )
    return found


def _compare(
    engine: Engine,
    prompt: DemoPrompt,
    ids: Sequence[int],
    config: DemoConfig,
    console: Console,
    heading: str,
) -> Comparison:
    if not console.is_terminal:
        _say(console, f"--- {heading}\n{visible(prompt.text).rstrip()}")
    panes = [Pane(ALONE), Pane(WITH_DRAFT)]
    records, texts = [], []
    with _Drawing(console, prompt.text, panes) as drawing:
        for pane in panes:
            record, text = engine.answer(
                ids,
                config,
                key=prompt.name,
                with_draft=pane is panes[1],
                changed=drawing.watching(pane),
            )
            records.append(record)
            texts.append(text)
            if not console.is_terminal:
                answer = visible("".join(p.text for p in text.pieces)).rstrip()
                _say(console, f"--- {pane.heading}, {pane.footer}\n{answer}")
    alone, assisted = records
    parted = margin = None
    if not config.temperature:
        parted = first_difference(alone.tokens, assisted.tokens)
    if parted is not None:
        margin = engine.margin([*ids, *alone.tokens[:parted]])
    return Comparison(alone, assisted, texts[1], parted, margin)


class _Drawing:
    """The frame of one prompt, drawn over and over in a terminal; nothing elsewhere."""

    def __init__(self, console: Console, prompt: str, panes: Sequence[Pane]) -> None:
        from rich.live import Live

        self._console, self._prompt, self._panes = console, prompt, panes
        self._last = 0.0
        # No thread of its own that would draw while the models compute.
        self._live = (
            Live(console=console, auto_refresh=False, transient=True)
            if console.is_terminal
            else None
        )

    def watching(self, pane: Pane) -> Callable[[LiveText], None]:
        """Return what brings an answer into its pane, and the pane to the terminal."""

        def watch(live: LiveText) -> None:
            pane.begun, pane.pieces, pane.passes = True, live.pieces, live.passes
            pane.tokens_per_second, pane.seconds = live.tokens_per_second, live.seconds
            self._draw()

        return watch

    def _draw(self) -> None:
        now = time.monotonic()
        if self._live is not None and now - self._last >= _FRAME_SECONDS:
            self._live.update(frame(self._console, self._prompt, self._panes), refresh=True)
            self._last = time.monotonic()

    def __enter__(self) -> _Drawing:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._live is None:
            return
        self._live.stop()
        # What was drawn over held only what fitted; this stays.
        self._console.print(frame(self._console, self._prompt, self._panes, whole=True))


def _say(console: Console, text: str) -> None:
    """Print a text as it is: no markup in it, and no line broken for a log."""
    console.print(text, markup=False, highlight=False, soft_wrap=True, emoji=False)
