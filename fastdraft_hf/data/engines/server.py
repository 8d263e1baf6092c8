"""Any server with OpenAI's completions API that takes and returns token ids, such as vLLM's.

A prompt is sent as token ids to ``/v1/completions``, and ``return_token_ids`` (vLLM 0.10.2 and
newer) asks for the ids of the completion, so text is never tokenized again. Every sampling setting
is sent: a server takes those that are missing from the model's generation config.
"""

import asyncio
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any
from urllib.parse import urlsplit

from fastdraft_hf._errors import FastDraftError
from fastdraft_hf.data.engines import Completion, Request, completed

# The only source of a key. Recipes, logs and errors never contain it.
KEY_VARIABLE = "VLLM_API_KEY"
# The client waits 0.5 to 8 seconds between tries, so these take about four minutes.
RETRIES = 30
# The client does not retry an answer that is not JSON.
TRIES = 3
# Seconds that one answer may take with all tries, at the start and later.
START_TIMEOUT, TIMEOUT = 120.0, 1800.0
# Bytes of an answer; ids need far less.
MOST_BYTES = 1 << 24


class _TooLong(BaseException):
    """An answer beyond `MOST_BYTES`. The client tries again after every `Exception`."""


async def _read(response: Any) -> None:
    """Read an answer to its end, up to the limit; the client has none."""
    stream, raw = response.stream, bytearray()
    async for part in stream:
        raw += part
        if len(raw) > MOST_BYTES or response.headers.get("Content-Encoding"):
            raise _TooLong
    await stream.aclose()
    httpx = sys.modules[type(response).__module__]  # from openai 3 on it is httpx2
    response.stream = httpx.ByteStream(bytes(raw))


class ServerEngine:
    """Generate through a server, with many requests in flight.

    Args:
        batch_size: requests in flight.
        vocab_size: ids from the server are below it.
        model: the model's name on the server. By default, the one that is served as ``target``.
        target: the target's name or folder.

    Raises:
        FastDraftError: the server does not answer, serves another model, or returns no ids.
    """

    name = "server"

    def __init__(
        self,
        url: str,
        stop_ids: set[int],
        batch_size: int = 64,
        *,
        vocab_size: int,
        model: str | None = None,
        target: str = "",
    ) -> None:
        try:
            from openai import AsyncOpenAI, DefaultAsyncHttpxClient
        except ImportError as error:
            raise FastDraftError(
                "generate.engine: a server needs openai; `pip install fastdraft_hf[server]`"
            ) from error
        self._url, self._stop_ids = server_url(url), stop_ids
        self._batch_size, self._vocab_size = batch_size, vocab_size
        client = AsyncOpenAI(
            base_url=self._url,
            api_key=os.environ.get(KEY_VARIABLE) or "EMPTY",
            max_retries=RETRIES,
            timeout=TIMEOUT,
            default_headers={"Accept-Encoding": "identity"},
            # A redirect would take the prompts to another machine.
            http_client=DefaultAsyncHttpxClient(
                event_hooks={"response": [_read]}, follow_redirects=False
            ),
        )
        # Few retries: at the start, a server that does not answer is most likely a wrong URL.
        self._client, self._timeout = client.with_options(max_retries=2), START_TIMEOUT
        self._loop = asyncio.new_event_loop()
        models = self._loop.run_until_complete(self._answer("data", self._client.models.list))
        self._model = _model_of(self._url, models, model, target)
        end = min(stop_ids)
        self._loop.run_until_complete(self._complete(Request(0, (end, end), 0.0, 0, 1, "")))
        self._client, self._timeout = client, TIMEOUT

    async def _complete(self, request: Request) -> Completion:
        choices = await self._answer(
            "choices",
            lambda: self._client.completions.create(
                model=self._model,
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
        return self._checked(request, choices[0] if choices else {})

    def _checked(self, request: Request, choice: dict[str, Any]) -> Completion:
        ids, prompt, url = choice.get("token_ids"), choice.get("prompt_token_ids"), self._url
        if not isinstance(ids, list):
            raise FastDraftError(
                f"{url}: it returns no token ids, and text is not tokenized again. vLLM 0.10.2 and "
                "newer does (return_token_ids)"
            )
        if prompt is not None and prompt != list(request.prompt_ids):
            got = len(prompt) if isinstance(prompt, list) else 0
            raise FastDraftError(
                f"{url}: it changed the prompt ({got} ids instead of "
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
        try:
            while True:
                for request in islice(waiting, self._batch_size - len(pending)):
                    pending.add(self._loop.create_task(self._complete(request)))
                if not pending:
                    return
                done, _ = self._loop.run_until_complete(
                    asyncio.wait(pending, timeout=1.0, return_when=asyncio.FIRST_COMPLETED)
                )
                completions = [task.result() for task in done]
                pending -= done
                over = on_tokens(sum(len(completion.ids) for completion in completions))
                yield from completions
                if over:
                    return
        finally:
            for task in pending:
                task.cancel()
            self._loop.run_until_complete(self._settle(pending))

    async def _settle(self, tasks: Iterable[asyncio.Task[Completion]]) -> None:
        """Wait for tasks and streams to end; what nobody waits for, asyncio reports as an error."""
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._loop.shutdown_asyncgens()

    async def _answer(self, field: str, call: Callable[[], Any]) -> list[dict[str, Any]]:
        """Await a call of the client and return a list of the answer."""
        import openai

        for _ in range(TRIES):
            try:
                found = getattr(await asyncio.wait_for(call(), self._timeout), field, None)
                if isinstance(found, list) and all(hasattr(one, "to_dict") for one in found):
                    return [one.to_dict() for one in found]
                fault = f"an answer without {field}"
            except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
                raise FastDraftError(
                    f"{self._url}: it does not accept the key (HTTP {error.status_code}). Set "
                    f"{KEY_VARIABLE}"
                ) from None
            except _TooLong:
                fault = f"an answer of more than {MOST_BYTES >> 20} MiB, or a compressed one"
                break
            except asyncio.TimeoutError:
                fault = f"an answer was not complete after {self._timeout:g} seconds"
                break
            except (ValueError, RecursionError) as error:
                fault = f"no JSON: {error}"
            except openai.APIConnectionError as error:
                fault = f"{type(error.__cause__ or error).__name__}: {error.__cause__ or error}"
                break
            except openai.APIStatusError as error:
                fault = f"HTTP {error.status_code}"
                if error.status_code in (408, 409, 429) or error.status_code >= 500:
                    break
                said = " ".join(error.response.text.split())[:300]
                key = os.environ.get(KEY_VARIABLE)
                raise FastDraftError(
                    f"{self._url}: it refuses the request ({fault}): "
                    f"{said.replace(key, '***') if key else said}"
                ) from None
        raise FastDraftError(
            f"generate.server: {self._url} does not answer ({fault}). Start the server or correct "
            "the URL, and run again; finished rows are kept"
        )


def server_url(text: str, key: str = "generate.server") -> str:
    """Return the base URL of a server, ending in ``/v1``.

    Raises:
        FastDraftError: with ``key``: it is not an http(s) URL, or it contains a password.
    """
    try:
        parts = urlsplit(text.strip())
        valid = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # brackets, or a port above 65535
        valid = False
    if not valid:
        shown = "a text with a password" if "@" in text else f"'{text}'"
        raise FastDraftError(f"{key}: {shown} is not a URL such as http://host:8000/v1")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise FastDraftError(
            f"{key}: the URL of {parts.hostname} has more than host and path. Put a key into the "
            f"environment variable {KEY_VARIABLE}"
        )
    return f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/').removesuffix('/v1')}/v1"


def _model_of(url: str, models: Sequence[dict[str, Any]], wanted: str | None, target: str) -> str:
    """Return the name of the target on a server, from its list of models."""

    def last(name: Any) -> str:
        return str(name).rstrip("/").rsplit("/", 1)[-1].lower()

    for model in models:
        # A server may have been started with a folder or with the id on the Hub.
        found = {last(model.get("id")), last(model.get("root"))}
        if model.get("id") == wanted if wanted is not None else last(target) in found:
            return str(model["id"])
    served = ", ".join(str(model.get("id")) for model in models) or "no model"
    raise FastDraftError(
        f"generate.server: {url} serves {served}, and none is called {wanted or target}. If one is "
        "the same model, set generate.server_model to its name"
    )
