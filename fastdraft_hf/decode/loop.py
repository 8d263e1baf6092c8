"""The loop of speculative decoding: draft a block, verify it in one pass, take the rest back.

One cache of the draft and one of the target live as long as the call. A round is γ passes of the
draft over one token (two in the first after a block was accepted whole, since its last token is new
to the draft), one pass of the target over γ + 1 tokens, and one transfer of the result to the host.
A draft with a mask token drafts all of a block in one pass over the new text and γ − 1 masks (PARD,
arXiv 2504.18583), which are taken back at once. A block that prompt lookup copies takes none.
Shapes: B rows that have not ended, g ≤ γ drafted tokens, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from transformers.generation.streamers import BaseStreamer

from fastdraft_hf.decode import rules
from fastdraft_hf.decode.cached import CachedModel
from fastdraft_hf.decode.lookup import PromptLookup
from fastdraft_hf.decode.scores import Prefix, Scores, widen
from fastdraft_hf.decode.settings import Drafting
from fastdraft_hf.decode.text import Stops, Text, followed_by

# Tokens, of all rows, that the draft is judged by when it looks back.
_LOOKED_AT = 16

# (row, drafted, accepted) of every round.
Report = Callable[[int, int, int], None]
# What a round did to one row: tokens appended, drafts that counted, whether the row has ended.
Outcome = tuple[int, int, bool]


class Block(NamedTuple):
    """The draft's tokens [B, g], how many of them count [B], when sampling their q [B, g, V]."""

    tokens: torch.Tensor
    limits: torch.Tensor
    q: torch.Tensor | None = None


class Verified(NamedTuple):
    """A verified block: for each row its new tokens before a stop cuts them, and its limit."""

    tokens: list[list[int]]
    limits: list[int]
    drafted: int  # g
    raw: torch.Tensor  # [B, g + 1, V] the target's logits
    scores: torch.Tensor  # [B, g + 1, V] processed


@dataclass
class Loop:
    """One call of assisted decoding.

    ``kept_scores`` and ``kept_logits``, a list for each row, collect one [e, V] per round.
    """

    target: CachedModel
    draft: CachedModel
    text: Text
    scores: Scores
    stops: Stops
    drafting: Drafting
    sampling: bool
    lookup: PromptLookup | None = None
    streamer: BaseStreamer | None = None
    report: Report | None = None
    kept_scores: list[list[torch.Tensor]] | None = None
    kept_logits: list[list[torch.Tensor]] | None = None

    def run(self) -> None:
        """Decode every row to its end."""
        self._active = list(range(len(self.text.lengths)))
        # Padding on the left needs no reading, also where the draft starts after the prompt.
        mask = self.text.mask
        self._draft_seen = [0 if mask is None else int((mask[r] == 0).sum()) for r in self._active]
        self._target_seen = [self.target.slots] * len(self._active)
        device = self.text.device
        ends = sorted(self.stops.ends)
        self._draft_ids = None if self.draft.token_ids is None else self.draft.token_ids.to(device)
        self._ends = torch.tensor(ends, device=device) if ends else None
        self._on_cpu = {device.type, self.target.device.type, self.draft.device.type} == {"cpu"}
        # Whether only the best token of the draft's logits matters.
        self._best_only = not self.sampling and self.scores.untouched
        self._copied: list[list[int]]  # for each active row, what it copies in this round
        # How many drafts of the round the draft has read, once it has read the text before them.
        self._ahead: int | None
        self._block: torch.Tensor  # of a draft with masks, the logits of the round's block
        self._draft_at: torch.Tensor  # of another, the positions of what it read last
        self._weighs = self.drafting.threshold > 0 or self.drafting.by_cost is not None
        # When sampling by cost, p of each row's tokens that the target wrote alone.
        self._alone: list[list[float]] = [[] for _ in self._active]
        while self._active:
            self._round()
        if self.streamer is not None:
            self.streamer.end()

    def _round(self) -> None:
        lengths = [self.text.lengths[r] for r in self._active]
        by_cost = self.drafting.by_cost
        if by_cost is not None:
            if by_cost.looks_back and all(self._room(row) > 0 for row in self._active):
                by_cost.looked_back(self._look_back(by_cost.idle))
            by_cost.begin(len(self._active))
        self._copied, self._ahead = [[] for _ in self._active], None
        if self.scores.in_order:
            drafted, outcomes = self._ordered_round()
        else:
            block = self._plain_block() if self._is_plain() else self._any_block()
            drafted, outcomes = block.drafted, []
            for row, tokens, limit, raw, scores in zip(
                self._active, block.tokens, block.limits, block.raw, block.scores, strict=True
            ):
                emitted, done = self._emit(row, tokens, raw, scores)
                outcomes.append((emitted, limit, done))
        kept = [emitted - 1 for emitted, _, _ in outcomes]
        if self.report is not None:
            for row, (emitted, limit, _) in zip(self._active, outcomes, strict=True):
                self.report(row, limit, emitted - 1)
        self.target.rollback(drafted, kept)
        if self._ahead is not None:
            stay = [min(self._ahead, k) for k in kept]
            self.draft.rollback(self._ahead, stay)
            self._draft_seen = [n + k for n, k in zip(lengths, stay, strict=True)]
        if self.lookup is not None:
            rows = zip(self._active, self._copied, outcomes, strict=True)
            for row, copied, (emitted, limit, _) in rows:
                if copied:
                    self.lookup.judge(row, limit, emitted - 1)
        if by_cost is not None:
            by_cost.end(drafted, outcomes, self._copied)
        self.drafting.adapt(all(emitted - 1 == limit for emitted, limit, _ in outcomes))
        going = [index for index, (_, _, done) in enumerate(outcomes) if not done]
        if len(going) < len(self._active):
            self._active = [self._active[i] for i in going]
            self._draft_seen = [self._draft_seen[i] for i in going]
            if going:
                self.target.select(going)
                if self.draft.slots:
                    self.draft.select(going)
        self._target_seen = [self.text.lengths[r] - 1 for r in self._active]

    def _look_back(self, rounds: int) -> list[float]:
        """Let the draft read the text, and return the acceptance that its drafts would have had.

        The target has written alone for ``rounds`` rounds. Of token x the acceptance is 1 if it is
        the draft's choice, and when sampling min(1, q(x) / p(x)), which has the right mean
        (`eval/expected.py`). The target reads nothing more for it, and the text stays what it is.
        """
        rows, lengths = self._active, [self.text.lengths[r] for r in self._active]
        unread = min(length - n for length, n in zip(lengths, self._draft_seen, strict=True))
        # Not many, for memory: they have logits over the vocabulary.
        count = min(rounds, unread - 1, max(1, _LOOKED_AT // len(rows)))
        tokens, positions, valid = self.text.unseen(rows, self._draft_seen)
        valid = None if valid is None else valid[:, :-1]
        # The last token is left, so that there is one to draft from.
        logits = self._feed(self.draft, tokens[:, :-1], positions[:, :-1], valid, count)
        self._draft_seen = [length - 1 for length in lengths]

        def prefix(index: int, position: int) -> torch.Tensor:
            return self.text.row(rows[index], lengths[index] - count + position)

        wide = widen(logits, self._draft_ids, self.scores.vocabulary)
        scores = self.scores(wide, prefix, rows)
        own = tokens[:, -count:]
        if not self.sampling:
            return (rules.first_choice(scores) == own).float().flatten().tolist()
        q = (scores / self.drafting.temperature_ratio).softmax(-1).gather(2, own[..., None])[..., 0]
        p = torch.tensor([self._alone[row][-count:] for row in rows], device=q.device)
        return (q / p).nan_to_num(0.0).clamp(max=1).flatten().tolist()

    def _ordered_round(self) -> tuple[int, list[Outcome]]:
        """Draft and verify one row whose processors are called once per emitted token, in order.

        Only those without a state process the draft, which changes the acceptance rate and not the
        output. Return the number of drafted tokens, and the row's outcome.
        """
        (row,) = self._active
        block = self._propose(self._limits())
        raw = self._read(block.tokens).float()
        limit, emitted = int(block.limits[0]), 0
        while True:
            scores = self.scores.step(raw[:, emitted], self.text.row(row, self.text.lengths[row]))
            drafts = block.tokens[:, emitted : emitted + 1] if emitted < limit else None
            q = None if drafts is None or block.q is None else block.q[:, emitted]
            token, accepted = rules.next_token(scores, drafts, q, self.sampling)
            one = raw[0, emitted : emitted + 1]
            _, done = self._emit(row, [token], one, scores)
            emitted += 1
            if done or not accepted:
                return block.tokens.shape[1], [(emitted, limit, done)]

    def _any_block(self) -> Verified:
        """Draft and verify any number of rows, on any device, greedily or not."""
        block = self._propose(self._limits())
        raw = scores = self._read(block.tokens)
        if not self.scores.untouched or self.sampling:
            raw = raw.float()
            prefix = self._prefix(list(block.tokens[:, :, None].unbind(1)))
            scores = self.scores(raw, prefix, self._active)
        if self.sampling:
            q = scores[:, :0] if block.q is None else block.q
            p = scores.softmax(-1)
            accepted, own = rules.accept_sampled(block.tokens, q, p, block.limits)
        else:
            accepted, own = rules.accept_greedy(block.tokens, scores, block.limits)
        columns = [accepted[:, None], own[:, None], block.limits[:, None], block.tokens]
        settled = torch.cat(columns, 1).tolist()
        return Verified(
            tokens=[[*values[3 : 3 + values[0]], values[1]] for values in settled],
            limits=[values[2] for values in settled],
            drafted=block.tokens.shape[1],
            raw=raw,
            scores=scores,
        )

    def _is_plain(self) -> bool:
        """Return whether one row is decoded greedily on the CPU, without processors."""
        return self._on_cpu and len(self._active) == 1 and self._best_only

    def _plain_block(self) -> Verified:
        """Draft and verify one greedy row with Python's numbers between the passes.

        The result is that of `_any_block`, whose hundred small operations take as long as a pass of
        a tiny draft.
        """
        limits, chances = self._limits(), list[float]()
        drafts, ids = self.stops.to_end(self._look_up(limits)[0]), self._draft_ids
        going = limits[0] > 0 and not drafts
        while going:
            last = torch.tensor([drafts[-1:]]) if drafts else None
            logits = self._next_logits(len(drafts), limits[0], last)[0, 0]
            best = int(rules.first_choice(logits))
            drafts.append(best if ids is None else int(ids[best]))
            if self._weighs:
                chances = [float(rules.certainty(logits, logits[best]))]
            going = self._drafts_more(limits, len(drafts), drafts[-1:], chances)
        drafted = len(drafts)
        raw = self._read(torch.tensor([drafts], dtype=torch.long))
        own = rules.first_choice(raw[0]).tolist()
        same = next((n for n in range(drafted) if drafts[n] != own[n]), drafted)
        return Verified([[*drafts[:same], own[same]]], [drafted], drafted, raw, raw)

    def _limits(self) -> list[int]:
        """Return how many tokens each row may draft."""
        by_cost = self.drafting.by_cost
        most = self.drafting.num_assistant_tokens if by_cost is None else by_cost.most
        return [max(0, min(most, self._room(row))) for row in self._active]

    def _room(self, row: int) -> int:
        """Return how many drafts fit, beside the target's own token; below 1 if none does."""
        length = self.text.lengths[row]
        room = self.stops.max_length - length - 1
        if self.drafting.max_positions is None:
            return room
        # The last drafted token is never read by the draft, so it may lie beyond.
        return min(room, self.drafting.max_positions - (length - self.text.offsets[row]) + 1)

    def _look_up(self, limits: list[int]) -> list[list[int]]:
        """Return what each row copies from its text, and remember it; nothing where it drafts.

        It may be longer than the row's limit, which holds for it only beside rows that draft.
        """
        if self.lookup is not None:
            by_cost = self.drafting.by_cost
            for index, (row, block) in enumerate(zip(self._active, limits, strict=True)):
                room = self._room(row)
                if by_cost is not None:
                    block = room = min(by_cost.copies, room)
                self._copied[index] = self.lookup.copy(row, block, room)
        return self._copied

    def _propose(self, limits: list[int]) -> Block:
        device, wanted = self.text.device, max(limits)
        copied = self._look_up(limits)
        if all(copy or not limit for copy, limit in zip(copied, limits, strict=True)):
            return self._copied_block(copied)
        chosen: list[torch.Tensor] = []
        distributions: list[torch.Tensor] = []
        # Reading every token from a GPU costs more than the passes that it could save.
        asks = device.type == "cpu" or self._weighs
        for position in range(wanted):
            logits = self._next_logits(position, wanted, chosen[-1] if chosen else None)
            token, q, chances = self._choose(logits, self._prefix(chosen, position))
            for index, copy in enumerate(copied):
                if position < len(copy):
                    token[index] = copy[position]
                    if q is not None:
                        q[index] = 0.0
                        q[index, copy[position]] = 1.0
                    if chances:
                        chances[index] = 1.0
            chosen.append(token)
            if q is not None:
                distributions.append(q)
            if asks and not self._drafts_more(limits, position + 1, token[:, 0].tolist(), chances):
                break
        drafts = torch.cat(chosen, 1)
        limit = torch.tensor(limits, device=device).clamp(max=len(chosen))
        if not asks and self._ends is not None:
            ends = torch.isin(drafts, self._ends).long()
            limit = torch.minimum(limit, (ends.cumsum(1) == ends).sum(1))
        return Block(drafts, limit, torch.stack(distributions, 1) if self.sampling else None)

    def _copied_block(self, copied: list[list[int]]) -> Block:
        """Return the block of rows that all copy, or may not draft and add nothing."""
        copied = [self.stops.to_end(copy) for copy in copied]
        limits = [len(copy) for copy in copied]
        padded = [copy + [0] * (max(limits) - len(copy)) for copy in copied]
        drafts = torch.tensor(padded, dtype=torch.long, device=self.text.device)
        q = None
        if self.sampling:
            q = torch.nn.functional.one_hot(drafts, self.scores.vocabulary).float()
        return Block(drafts, torch.tensor(limits, device=drafts.device), q)

    def _next_logits(self, drafted: int, wanted: int, last: torch.Tensor | None) -> torch.Tensor:
        """Return the draft's logits [B, 1, V'] after ``drafted`` of ``wanted`` tokens.

        ``last`` [B, 1] are the tokens drafted before, ``None`` for the first.
        """
        mask = self.drafting.mask_token
        if mask is not None and drafted:
            return self._block[:, drafted : drafted + 1]
        if last is not None and self._ahead is not None:
            self._draft_at = self._draft_at + 1
            self._ahead += 1
            return self._feed(self.draft, last, self._draft_at, None, 1)
        new, self._ahead = self.text.unseen(self._active, self._draft_seen), 0
        if mask is not None:
            rows = len(self._active)
            masks = new[0].new_full((rows, wanted - 1), mask)
            self._block = self._feed(self.draft, *followed_by(masks, *new), wanted)
            self.draft.rollback(wanted - 1, [0] * rows)
            return self._block[:, :1]
        self._draft_at = new[1][:, -1:]
        return self._feed(self.draft, *new, 1)

    def _choose(
        self, logits: torch.Tensor, prefix: Prefix
    ) -> tuple[torch.Tensor, torch.Tensor | None, list[float]]:
        """Return the draft's next tokens [B, 1], when sampling its q [B, V], and q of the tokens.

        The last is empty where nothing depends on it.
        """
        if self._best_only:
            scores = logits[:, -1]
        else:
            wide = widen(logits, self._draft_ids, self.scores.vocabulary)
            scores = self.scores(wide, prefix, self._active)[:, 0]
        if self.sampling:
            if logits.shape[-1] < self.scores.vocabulary:
                # Processors may have ruled out the whole reduced vocabulary; any guess is right.
                scores = scores.masked_fill(scores.isneginf().all(-1, keepdim=True), 0.0)
            q = (scores / self.drafting.temperature_ratio).softmax(-1)
            token = torch.multinomial(q, 1)
            return token, q, q.gather(1, token)[:, 0].tolist() if self._weighs else []
        token = rules.first_choice(scores)[:, None]
        best = scores.gather(1, token)
        if self._best_only and self._draft_ids is not None:
            token = self._draft_ids[token]
        return token, None, rules.certainty(scores, best).tolist() if self._weighs else []

    def _drafts_more(
        self, limits: list[int], drafted: int, tokens: list[int], chances: list[float]
    ) -> bool:
        """Close the blocks of rows that ended or are unsure; return whether any goes on."""
        threshold, by_cost = self.drafting.threshold, self.drafting.by_cost
        for index, token in enumerate(tokens):
            unsure = threshold and chances[index] < threshold
            if limits[index] > drafted and (token in self.stops.ends or unsure):
                limits[index] = drafted
        still = [limit > drafted for limit in limits]
        if by_cost is not None:
            by_cost.drafted(chances)
        return any(still) and (by_cost is None or by_cost.pays(still))

    def _read(self, drafts: torch.Tensor) -> torch.Tensor:
        """Return the target's logits [B, g + 1, V] of its unread tokens and ``drafts`` [B, g]."""
        new = self.text.unseen(self._active, self._target_seen)
        return self._feed(self.target, *followed_by(drafts, *new), drafts.shape[1] + 1)

    def _feed(
        self,
        model: CachedModel,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        valid: torch.Tensor | None,
        keep: int,
    ) -> torch.Tensor:
        device = model.device
        most = self.drafting.max_positions
        if model is self.draft and most is not None:
            # A row past the draft's limit drafts nothing, yet passes through with the others.
            positions = positions.clamp(max=most - 1)
        if device == self.text.device:
            return model.feed(tokens, positions, valid, keep)
        moved = None if valid is None else valid.to(device)
        logits = model.feed(tokens.to(device), positions.to(device), moved, keep)
        return logits.to(self.text.device)

    def _prefix(self, drafts: list[torch.Tensor], first: int = 0) -> Prefix:
        """Return the text before position p of a block: that of the row and first + p drafts."""
        rows = self._active

        def prefix(index: int, position: int) -> torch.Tensor:
            text = self.text.row(rows[index], self.text.lengths[rows[index]])
            before = drafts[: first + position]
            return torch.cat([text, *(d[index : index + 1] for d in before)], 1)

        return prefix

    def _emit(
        self, row: int, tokens: list[int], raw: torch.Tensor, scores: torch.Tensor
    ) -> tuple[int, bool]:
        """Append tokens to a row up to its first stop; return how many, and whether it is done."""
        new, done = self.stops.cut(self.text, row, tokens)
        if self.sampling and self.drafting.by_cost is not None and len(tokens) == 1:
            self._alone[row].append(float(scores[0].float().softmax(-1)[tokens[0]]))
        if self.kept_scores is not None:
            self.kept_scores[row].append(scores[: len(new)].float())
        if self.kept_logits is not None:
            self.kept_logits[row].append(raw[: len(new)].float())
        if self.streamer is not None:
            self.streamer.put(torch.tensor([new]))
        return len(new), done
