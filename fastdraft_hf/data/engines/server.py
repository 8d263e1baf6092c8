"""Any server with OpenAI's completions API that takes and returns token ids, such as vLLM's.

A prompt is sent as token ids to ``/v1/completions``, and ``return_token_ids`` (vLLM 0.10.2 and
newer) asks for the ids of the completion, so text is never tokenized again. Every sampling setting
is sent: a server takes those that are missing from the model's generation config.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any
from urllib.parse import urlsplit

from fastdraft_hf._errors import FastDraftError
from fastdraft_hf.data.engines import Completion, Request, completed

logger = logging.getLogger(__name__)

# The only source of a key. Recipes, logs and errors never contain it.
KEY_VARIABLE = "VLLM_API_KEY"
# The client waits 0.5 to 8 seconds between tries, so these take about four minutes.
RETRIES = 30
# Consecutive failed requests after which a server is given up. The client does not retry an answer
# that is not JSON.
FAILURES = 3
# Seconds that one answer may take.
TIMEOUT = 1800.0


@dataclass
class _Server:
    url: str
    client: Any
    model: str = ""
    in_flight: int = 0
    failures: int = 0
    fault: str = ""


class ServerEngine:
    """Generate through one server or several. A request goes to the one with the fewest in flight.

    Args:
        urls: of the servers.
        stop_ids: token ids that end a completion.
        batch_size: requests in flight per server.
        vocab_size: ids from a server are below it.
        model: the model's name on the servers. By default, the one that is served as ``target``.
        target: the target's name or folder.

    Raises:
        FastDraftError: a server does not answer, serves another model, or returns no ids.
    """

    name = "server"

    def __init__(
        self,
        urls: Sequence[str],
        stop_ids: set[int],
        batch_size: int = 64,
        *,
        vocab_size: int,
        model: str | None = None,
        target: str = "",
    ) -> None:
        try:
            from openai import AsyncOpenAI
        except ImportError as error:
            raise FastDraftError(
                "generate.engine: a server needs openai; `pip install fastdraft_hf[server]`"
            ) from error
        self._stop_ids, self._batch_size, self._vocab_size = stop_ids, batch_size, vocab_size
        self._loop = asyncio.new_event_loop()
        key = os.environ.get(KEY_VARIABLE) or "EMPTY"
        self._servers: list[_Server] = []
        for url in dict.fromkeys(map(server_url, urls)):
            client = AsyncOpenAI(base_url=url, api_key=key, max_retries=RETRIES, timeout=TIMEOUT)
            server = _Server(url, client)
            try:
                self._loop.run_until_complete(self._greet(server, model, target))
            except _ServerFault as fault:
                raise FastDraftError(
                    f"generate.server: {url} does not answer ({fault}). Start the server or "
                    "correct the URL"
                ) from None
            self._servers.append(server)

    async def _greet(self, server: _Server, model: str | None, target: str) -> None:
        """Check that a server has the model, takes ids and returns ids."""
        # Few retries: at the start, a server that does not answer is most likely a wrong URL.
        patient, server.client = server.client, server.client.with_options(max_retries=2)
        models = await _answer(server, server.client.models.list())
        served = [entry.to_dict() for entry in models.data]
        server.model = _model_of(server.url, served, model, target)
        end = min(self._stop_ids)
        await self._ask(server, Request(0, (end, end), 0.0, 0, 1, ""))
        server.client = patient

    async def _ask(self, server: _Server, request: Request) -> Completion:
        answer = await _answer(
            server,
            server.client.completions.create(
                model=server.model,
                prompt=list(request.prompt_ids),
                max_tokens=request.max_new_tokens,
                temperature=request.temperature,
                top_p=request.top_p,
                seed=request.seed,
                n=1,
                presence_penalty=0.0,
                frequency_penalty=0.0,
                extra_body={
                    "stop_token_ids": sorted(self._stop_ids),
                    "return_token_ids": True,
                    "top_k": 0,
                    "min_p": 0.0,
                    "repetition_penalty": 1.0,
                    "add_special_tokens": False,
                    "skip_special_tokens": False,
                },
            ),
        )
        choices = getattr(answer, "choices", None)
        if not choices:
            raise _ServerFault("an answer without choices")
        return self._checked(request, choices[0].to_dict(), server.url)

    def _checked(self, request: Request, choice: dict[str, Any], url: str) -> Completion:
        """Return the completion of an answer.

        Raises:
            FastDraftError: it has no ids, ids outside the vocabulary, another prompt, another stop
                token, or a length limit of the server's own.
        """
        ids, prompt = choice.get("token_ids"), choice.get("prompt_token_ids")
        if ids is None:
            raise FastDraftError(
                f"{url}: it returns no token ids, and text is not tokenized again. vLLM 0.10.2 and "
                "newer does (return_token_ids)"
            )
        if prompt is not None and prompt != list(request.prompt_ids):
            raise FastDraftError(
                f"{url}: it changed the prompt ({len(prompt)} ids instead of "
                f"{len(request.prompt_ids)}). The server must use prompts of token ids as they are"
            )
        for token in ids:
            if type(token) is not int or not 0 <= token < self._vocab_size:
                raise FastDraftError(
                    f"{url}: it returned token id {token!r}, and the target's vocabulary has "
                    f"{self._vocab_size} ids. Is it the same model?"
                )
        done = completed(request, ids, self._stop_ids)
        if done.finish_reason == "stop":
            return done
        finish, stop = choice.get("finish_reason"), choice.get("stop_reason")
        if finish == "stop":
            if isinstance(stop, int) and stop in self._stop_ids:  # some versions leave it out
                return Completion(request, (*done.ids, stop), "stop")
            raise FastDraftError(
                f"{url}: a completion was stopped by something other than the target's own end "
                f"tokens (stop_reason {stop!r}). Is it the same model and generation config?"
            )
        if len(done.ids) < request.max_new_tokens:
            raise FastDraftError(
                f"{url}: a completion ended after {len(done.ids)} of {request.max_new_tokens} "
                f"tokens ({finish}). With a prompt of {len(request.prompt_ids)} tokens it may not "
                "fit the server's --max-model-len"
            )
        return done

    def generate(
        self, requests: Iterable[Request], on_tokens: Callable[[int], bool | None]
    ) -> Iterator[Completion]:
        waiting = iter(requests)
        pending: set[asyncio.Task[Completion]] = set()
        for server in self._servers:  # one that was given up has another chance with every set
            server.failures = 0
        try:
            while True:
                room = self._batch_size * max(1, len(self._alive())) - len(pending)
                for request in islice(waiting, max(0, room)):
                    pending.add(self._loop.create_task(self._complete(request)))
                if not pending:
                    return
                done, pending = self._loop.run_until_complete(
                    asyncio.wait(pending, timeout=1.0, return_when=asyncio.FIRST_COMPLETED)
                )
                completions = [task.result() for task in done]
                over = on_tokens(sum(len(completion.ids) for completion in completions))
                yield from completions
                if over:
                    return
        finally:
            for task in pending:
                task.cancel()
            if pending:
                self._loop.run_until_complete(asyncio.wait(pending))

    def _alive(self) -> list[_Server]:
        return [server for server in self._servers if server.failures < FAILURES]

    async def _complete(self, request: Request) -> Completion:
        """Ask the least busy server; after a failure, ask again until none is left."""
        while alive := self._alive():
            server = min(alive, key=lambda server: server.in_flight)
            server.in_flight += 1
            try:
                completion = await self._ask(server, request)
                server.failures = 0
                return completion
            except _ServerFault as fault:
                server.failures += 1
                server.fault = f"row {request.index}: {fault}"
                if server.failures == FAILURES:
                    logger.warning("%s: given up (%s)", server.url, server.fault)
            finally:
                server.in_flight -= 1
        faults = "; ".join(f"{server.url}: {server.fault}" for server in self._servers)
        raise FastDraftError(
            f"generate.server: no server answers any more ({faults}). Finished rows are kept: "
            "start the server and run again"
        )


class _ServerFault(Exception):
    """A fault of a server that may pass: overloaded, restarting, unreachable."""


async def _answer(server: _Server, call: Any) -> Any:
    """Await a call of the client; raise `_ServerFault` for a fault that may pass.

    Raises:
        FastDraftError: the server refuses the request.
    """
    import openai

    try:
        return await call
    except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
        raise FastDraftError(
            f"{server.url}: it does not accept the key (HTTP {error.status_code}). Set "
            f"{KEY_VARIABLE}"
        ) from None
    except (openai.APIConnectionError, openai.APIResponseValidationError, ValueError) as error:
        cause = error.__cause__
        raise _ServerFault(f"{type(cause or error).__name__}: {cause or error}") from None
    except openai.APIStatusError as error:
        if error.status_code in (408, 409, 429) or error.status_code >= 500:
            raise _ServerFault(f"HTTP {error.status_code}") from None
        said = " ".join(error.response.text.split())[:300]
        key = os.environ.get(KEY_VARIABLE)
        raise FastDraftError(
            f"{server.url}: it refuses the request (HTTP {error.status_code}): "
            f"{said.replace(key, '***') if key else said}"
        ) from None


def server_url(text: str) -> str:
    """Return the base URL of a server, ending in ``/v1``.

    Raises:
        FastDraftError: it is not an http(s) URL, or it contains a password.
    """
    parts = urlsplit(text.strip())
    if parts.scheme not in ("http", "https") or not parts.hostname:
        shown = "a text with a password" if "@" in text else f"'{text}'"
        raise FastDraftError(f"generate.server: {shown} is not a URL such as http://host:8000/v1")
    if parts.username or parts.password or parts.query:
        raise FastDraftError(
            f"generate.server: the URL of {parts.hostname} has more than host and path. Put a key "
            f"into the environment variable {KEY_VARIABLE}"
        )
    return f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/').removesuffix('/v1')}/v1"


def _model_of(url: str, models: Sequence[dict[str, Any]], wanted: str | None, target: str) -> str:
    """Return the name of the target on a server, from its list of models."""

    def last(name: Any) -> str:
        return str(name).rstrip("/").rsplit("/", 1)[-1].lower()

    served = ", ".join(str(model.get("id")) for model in models) or "no model"
    if wanted is not None:
        if any(model.get("id") == wanted for model in models):
            return wanted
        raise FastDraftError(f"generate.server_model: {url} serves {served}, not '{wanted}'")
    for model in models:
        # A server may have been started with a folder or with the id on the Hub.
        if last(target) in {last(model.get("id")), last(model.get("root"))}:
            return str(model["id"])
    raise FastDraftError(
        f"generate.server: {url} serves {served}, and none is called {target}. If one is the same "
        "model, set generate.server_model to its name"
    )
