"""Time whole rounds of our decoding loop with a draft beside its target.

Rounds are real ones (`fastdraft_hf.decode.loop`), so a pass finds the CPU's caches as it does when
decoding. Drafts may be untrained: the time of a round does not depend on what it accepts, except
that a draft reads one more token after a block that was accepted entirely, which is not timed.
"""

import contextlib
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fastdraft_hf.decode.loop import Loop
from fastdraft_hf.decode.scores import Scores
from fastdraft_hf.decode.settings import Drafting
from fastdraft_hf.decode.speculative import one_torch_thread, open_cached
from fastdraft_hf.decode.text import Stops, Text
from fastdraft_hf.draft.reduced_vocabulary import load_draft


class _EnoughError(Exception):
    """Ends a loop from the inside."""


class LoopTimer:
    """Time drafts in our loop beside one target.

    Args:
        target: the target's folder; for ``openvino`` its export.
        measure: cpu, cuda or openvino.
        gammas: values of γ.
        context: tokens in the caches at the start.
        rounds: rounds kept for each γ; one more before them warms up.
    """

    def __init__(
        self, target: Path, measure: str, gammas: Sequence[int], context: int, rounds: int
    ) -> None:
        self._measure, self._gammas, self._rounds = measure, list(gammas), rounds
        self._target = self._load(target)
        self._vocabulary = self._target.config.get_text_config().vocab_size
        rng = random.Random(0)
        self._prompt = [rng.randrange(self._vocabulary) for _ in range(context)]

    def measure(self, draft: Path, repeat: int) -> dict[int, list[float]]:
        """Return γ -> seconds of each round with a draft; each repeat has its own order of γ."""
        model = self._load(draft)
        order = random.Random(repeat).sample(self._gammas, len(self._gammas))
        # One γ after the other, as decoding keeps to one: OpenVINO prepares a pass again when its
        # width changes.
        plan = [gamma for gamma in order for _ in range(self._rounds + 1)]
        drafting = Drafting(plan[0])
        found: dict[int, list[float]] = {gamma: [] for gamma in sorted(order)}
        number, start = -1, 0.0  # the first round reads the prompt

        def report(row: int, drafted: int, accepted: int) -> None:
            nonlocal number, start
            if number >= 0 and number % (self._rounds + 1):
                found[plan[number]].append(time.perf_counter() - start)
            number += 1
            if number == len(plan):
                raise _EnoughError
            drafting.num_assistant_tokens = plan[number]
            start = time.perf_counter()

        openvino = self._measure == "openvino"
        threads = one_torch_thread() if openvino else contextlib.nullcontext()
        with torch.inference_mode(), threads, contextlib.suppress(_EnoughError):
            target = open_cached(self._target)
            ids = torch.tensor([self._prompt], device=target.device)
            positions = torch.arange(len(self._prompt), device=target.device)[None]
            Loop(
                target=target,
                draft=open_cached(model),
                text=Text(ids, None, positions, 0),
                scores=Scores([], self._vocabulary),
                stops=Stops(max_length=1 << 30),
                drafting=drafting,
                sampling=False,
                report=report,
            ).run()
        return found

    def _load(self, folder: Path) -> Any:
        if self._measure == "openvino":
            from optimum.intel import OVModelForCausalLM

            return OVModelForCausalLM.from_pretrained(folder, compile=False)  # the loop compiles
        cuda = self._measure == "cuda"
        model = load_draft(folder, dtype="bfloat16" if cuda else "float32")
        return model.to(self._measure).eval()
