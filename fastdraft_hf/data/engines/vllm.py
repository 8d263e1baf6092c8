"""Servers that speak vLLM's OpenAI-compatible protocol: many requests in flight, ids both ways.

A prompt is sent as token ids to ``/v1/completions`` and ``return_token_ids`` (vLLM 0.10.2 and
newer) asks for the ids of the answer, so nothing is ever tokenised again. Every sampling setting
is sent, for a server fills in those that are left out from the model's own generation config.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any

from fastdraft_hf._errors import FastDraftError
from fastdraft_hf.data.engines import Completion, completed
from fastdraft_hf.data.engines.servers import Patience, Server, ServerTrouble, server_url
from fastdraft_hf.data.requests import Request

logger = logging.getLogger(__name__)

# One text may fail this often on servers that answer others, before it is taken to be at fault.
_TRIES = 12
# How often to look whether a server may be asked again.
_POLL_SECONDS = 0.05


class VLLMEngine:
    """Writes through one server or several; a text goes to the one with the fewest in flight.

    A server that fails is tried again after a growing time, and given up after
    ``patience.failures`` failures in a row; the others take its work.

    Args:
        urls: of the servers.
        stop_ids: token ids that end a text.
        batch_size: texts in flight on each server.
        model: the model's name on the servers; by default the one served as ``target``.
        target: the target's name or folder, which the served model must be.
        patience: with failing servers.

    Raises:
        FastDraftError: no server answers, one serves another model, or does not return ids.
    """

    name = "vllm"

    def __init__(
        self,
        urls: Sequence[str],
        stop_ids: set[int],
        batch_size: int = 64,
        *,
        model: str | None = None,
        target: str = "",
        patience: Patience | None = None,
    ) -> None:
        self._stop_ids, self._batch_size = stop_ids, batch_size
        self._patience = patience or Patience()
        cleaned = list(dict.fromkeys(map(server_url, urls)))
        self._servers = [Server(url, self._patience, batch_size) for url in cleaned]
        for server in list(self._servers):
            try:
                self._greet(server, model, target)
            except ServerTrouble as trouble:
                server.last_fault = str(trouble)
                if len(self._servers) == 1:
                    raise FastDraftError(
                        f"generate.server: {_these(cleaned)} ({trouble})"
                    ) from None
                logger.warning("%s: left out, it does not answer (%s)", server.url, trouble)
                self._servers.remove(server)

    def _greet(self, server: Server, model: str | None, target: str) -> None:
        """Check a server: it has the model, takes ids and returns ids."""
        answer = self._patiently(server, "/models", None)
        server.model = _model_of(server.url, answer, model, target)
        end = min(self._stop_ids)
        probe = Request(0, (end, end), 0.0, 0, 1, "")
        answer = self._patiently(server, "/completions", self._body(server, probe))
        self._read(server, probe, answer)

    def _patiently(self, server: Server, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        """Call with a few tries: at the start a dead server is most likely a wrong address."""
        for attempt in range(1, 4):
            try:
                return server.call(path, body)
            except ServerTrouble:
                if attempt == 3:
                    raise
                time.sleep(self._patience.wait(attempt))
        raise AssertionError

    def _body(self, server: Server, request: Request) -> dict[str, Any]:
        return {
            "model": server.model,
            "prompt": list(request.prompt_ids),
            "max_tokens": request.max_new_tokens,
            "temperature": request.temperature,
            "top_p": request.top_p,
            "seed": request.seed,
            "stop_token_ids": sorted(self._stop_ids),
            "return_token_ids": True,
            "n": 1,
            "top_k": 0,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "add_special_tokens": False,
            "skip_special_tokens": False,
        }

    def _read(self, server: Server, request: Request, answer: dict[str, Any]) -> Completion:
        """Return the completion of an answer.

        Raises:
            ServerTrouble: the answer is broken.
            FastDraftError: the server returns no ids, or changed the prompt.
        """
        choices = answer.get("choices")
        if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
            raise ServerTrouble("an answer without its one choice")
        ids, prompt = choices[0].get("token_ids"), choices[0].get("prompt_token_ids")
        if ids is None:
            raise FastDraftError(
                f"{server.url}: it does not return token ids, and text is not tokenised again; "
                "vLLM 0.10.2 or newer does (return_token_ids)"
            )
        if not isinstance(ids, list) or not all(type(token) is int for token in ids):
            raise ServerTrouble("token_ids that are no list of ids")
        if prompt is not None and prompt != list(request.prompt_ids):
            raise FastDraftError(
                f"{server.url}: it answered another prompt than was sent ({len(prompt)} ids, not "
                f"{len(request.prompt_ids)}); prompts must be taken as they stand"
            )
        reason, stopped_by = choices[0].get("finish_reason"), choices[0].get("stop_reason")
        if reason not in ("stop", "length"):
            raise ServerTrouble(f"a text that ended by {reason}")
        done = completed(request, ids, self._stop_ids)
        if reason == "stop" and done.finish_reason == "length":
            # Some versions leave the token that stopped it out of the ids.
            if type(stopped_by) is int and stopped_by in self._stop_ids:
                return Completion(request, (*done.ids, stopped_by), "stop")
            raise FastDraftError(
                f"{server.url}: a text was stopped by something other than the target's own end "
                f"tokens (stop_reason {stopped_by!r}); is it the same model and generation config?"
            )
        if done.finish_reason == "length" and len(done.ids) < request.max_new_tokens:
            raise FastDraftError(
                f"{server.url}: a text ended after {len(done.ids)} of {request.max_new_tokens} "
                f"tokens; with a prompt of {len(request.prompt_ids)} it does not fit the server's "
                "--max-model-len"
            )
        return done

    def generate(
        self, requests: Iterable[Request], on_tokens: Callable[[int], None]
    ) -> Iterator[Completion]:
        waiting = iter(requests)
        again: deque[tuple[Request, int]] = deque()
        answers: SimpleQueue[_Answer] = SimpleQueue()
        running, exhausted = 0, False
        for one in self._servers:  # one that was given up has another chance with every set
            one.in_flight = one.failures = 0
        while True:
            while (server := self._free()) is not None:
                tries = 0
                if again:
                    request, tries = again.popleft()
                else:
                    new = None if exhausted else next(waiting, None)
                    if new is None:
                        exhausted = True
                        break
                    request = new
                server.in_flight += 1
                running += 1
                asked = _Answer(request, server, time.monotonic(), tries + 1)
                # Daemons: an answer that never comes must not keep a process from ending.
                Thread(target=self._ask, args=(asked, answers), daemon=True).start()
            if not running and exhausted and not again:
                return
            for answer in _arrived(answers):
                running -= 1
                answer.server.in_flight -= 1
                if isinstance(answer.result, ServerTrouble):
                    self._fault(answer, answer.result)
                    again.append((answer.request, answer.tries))
                elif isinstance(answer.result, Completion):
                    answer.server.answered()
                    on_tokens(len(answer.result.ids))
                    yield answer.result
                else:
                    raise answer.result

    def _ask(self, asked: _Answer, answers: SimpleQueue[_Answer]) -> None:
        server, request = asked.server, asked.request
        try:
            answer = server.call("/completions", self._body(server, request))
            asked.result = self._read(server, request, answer)
        except BaseException as error:  # raised again where the texts are taken
            asked.result = error
        answers.put(asked)

    def _free(self) -> Server | None:
        """Return the server to ask next: the least busy of those that may be asked now."""
        now = time.monotonic()
        able = [
            server
            for server in self._servers
            if not server.dead
            and server.not_before <= now
            # After a fault one request finds out whether it is over, not all of them.
            and server.in_flight < (1 if server.failures else self._batch_size)
        ]
        return min(able, key=lambda server: server.in_flight, default=None)

    def _fault(self, answer: _Answer, trouble: ServerTrouble) -> None:
        server, was_dead = answer.server, answer.server.dead
        server.failed(answer.begun, trouble)
        if server.dead and not was_dead:
            logger.warning("%s: given up (%s)", server.url, trouble)
        self._check_alive()
        if answer.tries >= _TRIES:
            raise FastDraftError(
                f"{server.url}: text {answer.request.index} failed {answer.tries} times "
                f"({trouble}) while others were answered; what is finished is kept"
            )

    def _check_alive(self) -> None:
        if all(server.dead for server in self._servers):
            faults = "; ".join(f"{s.url}: {s.last_fault}" for s in self._servers)
            raise FastDraftError(
                f"generate.server: no server answers any more ({faults}); what is finished is "
                "kept, run again to go on"
            )


@dataclass
class _Answer:
    """A request on its way, and what came of it."""

    request: Request
    server: Server
    begun: float
    tries: int
    result: Completion | BaseException = dataclasses.field(default_factory=BaseException)


def _arrived(answers: SimpleQueue[_Answer]) -> Iterator[_Answer]:
    """Wait a moment for the first answer; yield it and all others that are there."""
    try:
        yield answers.get(timeout=_POLL_SECONDS)
        while True:
            yield answers.get_nowait()
    except Empty:
        return


def _these(urls: Sequence[str]) -> str:
    return f"{urls[0]} does not answer" if len(urls) == 1 else f"none of {', '.join(urls)} answers"


def _model_of(url: str, answer: dict[str, Any], wanted: str | None, target: str) -> str:
    """Return the name of the target on a server, from its list of models.

    Raises:
        FastDraftError: it is not served.
    """
    entries = answer.get("data")
    models = [m for m in entries if isinstance(m, dict)] if isinstance(entries, list) else []
    served = [str(m.get("id")) for m in models]
    if wanted is not None:
        if wanted in served:
            return wanted
        raise FastDraftError(
            f"generate.server_model: {url} serves {', '.join(served) or 'no model'}, not '{wanted}'"
        )
    for model in models:
        names = {str(model.get("id")), str(model.get("root"))}
        # A server may have been started with a folder, or with the id of the Hub.
        if target in names or _last(target) in {_last(name) for name in names}:
            return str(model["id"])
    raise FastDraftError(
        f"generate.server: {url} serves {', '.join(served) or 'no model'}, and none is called "
        f"{target}; if one is the same model, name it by generate.server_model"
    )


def _last(name: str) -> str:
    return name.rstrip("/").rsplit("/", 1)[-1].lower()
