"""The two answers as a frame of text: two columns, or two panes on a narrow terminal."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from fastdraft_hf.decode.live import Piece

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.text import Text

ALONE, WITH_DRAFT = "the target alone", "with the draft"
# Below this width, two columns would break every line of code.
TWO_COLUMNS = 100
ACCEPTED = "green"
# With NO_COLOR, a terminal still underlines.
ACCEPTED_WITHOUT_COLOUR = "underline"
_TAB = 4
_PROMPT_LINES = 8
# Lines of a frame that hold no answer: borders, headings, legend.
_FRAME_LINES = 3


@dataclass
class Pane:
    """One side of the frame.

    Attributes:
        title: whose answer it is.
        pieces: the answer so far.
        tokens_per_second: so far.
        seconds: so far.
        passes: forward passes of the target so far.
        begun: whether its turn has come.
    """

    title: str
    pieces: Sequence[Piece] = field(default_factory=list)
    tokens_per_second: float = 0.0
    seconds: float = 0.0
    passes: int = 0
    begun: bool = False

    @property
    def heading(self) -> str:
        if not self.begun:
            return f"{self.title}: waits for its turn"
        return f"{self.title}: {self.tokens_per_second:.1f} tokens/s"

    @property
    def footer(self) -> str:
        if not self.begun:
            return ""
        return f"{len(self.pieces)} tokens, {self.passes} passes, {self.seconds:.1f} s"


def visible(text: str) -> str:
    """Return a text without control characters: what a model writes must not steer a terminal."""
    shown = (c if c in "\n\t" or unicodedata.category(c) != "Cc" else "\ufffd" for c in text)
    return "".join(shown).expandtabs(_TAB)


def answer_text(pieces: Sequence[Piece], style: str) -> Text:
    """Return an answer with its accepted tokens in ``style`` and the target's own plain."""
    from rich.text import Text

    text = Text()
    for piece in pieces:
        text.append(visible(piece.text), style if piece.accepted else "")
    return text


def accepted_style(console: Console) -> str:
    """Return the style of accepted tokens on this terminal."""
    return ACCEPTED_WITHOUT_COLOUR if console.no_color else ACCEPTED


def frame(
    console: Console, prompt: str, panes: Sequence[Pane], *, whole: bool = False
) -> RenderableType:
    """Return the frame of one prompt.

    Args:
        console: it is drawn on; its width decides between columns and panes.
        prompt: what is answered.
        panes: left and right, or upper and lower.
        whole: the answers from beginning to end; otherwise only what fits the terminal's height,
            their ends, so that the frame can be drawn over.
    """
    from rich.console import Group
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    width = console.width
    columns = width >= TWO_COLUMNS
    style = accepted_style(console)
    asked = list(Text(visible(prompt).rstrip(), style="dim").wrap(console, width - 4))
    if len(asked) > _PROMPT_LINES:
        asked = asked[: _PROMPT_LINES - 1]
        asked.append(Text("…", style="dim"))
    head = Panel(Text("\n").join(asked), title="prompt", title_align="left", border_style="dim")
    room = console.height - len(asked) - 2 - _FRAME_LINES
    room = max(3, room - 2 if columns else room // 2 - 2)
    drawn = []
    for pane in panes:
        inner = (width // 2 if columns else width) - 4
        lines = list(answer_text(pane.pieces, style).wrap(console, inner))
        if not whole:
            lines = lines[-room:]
        drawn.append(
            Panel(
                Text("\n").join(lines),
                title=Text(pane.heading, style="bold"),
                subtitle=Text(pane.footer) if pane.footer else None,
                title_align="left",
                subtitle_align="left",
                # Columns side by side, of one height.
                height=None if whole else room + 2,
            )
        )
    if columns:
        table = Table.grid(expand=True)
        for _ in drawn:
            table.add_column(ratio=1)
        table.add_row(*drawn)
        body: list[RenderableType] = [table]
    else:
        body = [*drawn]
    legend = Text.assemble(
        ("accepted drafted tokens", style), "   the target's own tokens   ", style=""
    )
    return Group(head, *body, legend)
