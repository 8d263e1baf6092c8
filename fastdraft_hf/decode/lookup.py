"""Prompt lookup: a block copied from the text itself, without a pass of the draft.

Where the last tokens of a text stood in it before, what followed them there is often what follows
now (Saxena 2023, https://github.com/apoorvumang/prompt-lookup-decoding). Small drafts learn to copy
late in their training, so that the two complete each other.
"""

from fastdraft_hf.decode.text import Text

# Blocks of a row that may be rejected whole, less those that were not, before it copies no more:
# where repetition is penalized, no copy is right.
_PATIENCE = 8
# After a copy that was accepted whole the next may be twice as long, up to so many blocks: who
# repeats a passage seldom stops after a few tokens.
_LONGEST = 4


class PromptLookup:
    """What followed the last ``length`` tokens of each row the last time that they stood in it."""

    def __init__(self, text: Text, length: int) -> None:
        self._text, self._length = text, length
        rows = len(text.lengths)
        self._ids: list[list[int]] = [[] for _ in range(rows)]
        # `length` tokens -> the position after the last time that they stood in the row
        self._after: list[dict[tuple[int, ...], int]] = [{} for _ in range(rows)]
        self._patience = [_PATIENCE] * rows
        self._blocks = [1] * rows  # that the next copy may be as long as

    def copy(self, row: int, block: int, room: int) -> list[int]:
        """Return ``block`` tokens or a multiple, up to ``room``; none where the row has no copy.

        A copy that reaches the end of the text starts again from its first token.
        """
        count = min(block * self._blocks[row], room)
        if count < 1 or not self._patience[row]:
            return []
        ids, after, length = self._ids[row], self._after[row], self._length
        known = len(ids)
        ids += self._text.row(row, self._text.lengths[row])[0, known:].tolist()
        for end in range(max(length, known), len(ids)):
            after[tuple(ids[end - length : end])] = end
        start = after.get(tuple(ids[-length:]))
        return [] if start is None else [ids[start + n % (len(ids) - start)] for n in range(count)]

    def judge(self, row: int, copied: int, accepted: int) -> None:
        """Note how many tokens of the row's last copy were accepted."""
        self._patience[row] = min(_PATIENCE, self._patience[row] + (1 if accepted else -1))
        whole = accepted == copied
        self._blocks[row] = min(_LONGEST, 2 * self._blocks[row]) if whole else 1
