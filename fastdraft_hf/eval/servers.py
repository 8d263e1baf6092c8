"""Running servers of vLLM and llama.cpp: to time them, and to see how their text is distributed.

Prompts are sent as token ids, and answers are streamed back as token ids.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import time
import urllib.error
import urllib.request
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch

from fastdraft_hf._errors import FastDraftError
from fastdraft_hf.data.engines.server import KEY_VARIABLE, server_url
from fastdraft_hf.data.target_logits import FLOOR, DistributionReader, TopK
from fastdraft_hf.decode.records import DecodingRecord

# Seconds without a byte of an answer, and bytes of a line of it.
TIMEOUT = 600.0
MOST_BYTES = 1 << 26


class Answer(NamedTuple):
    """New token ids, seconds until the first, and what was drafted and accepted if it is known."""

    ids: list[int]
    first_token_seconds: float
    drafted: int = 0
    accepted: int = 0


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would take the key and the prompts to another machine."""

    def redirect_request(self, *_: Any) -> None:
        return None


class Client(ABC):
    """The client of a server that is running.

    Args:
        url: ``http://host:port``.
        key: setting that the URL comes from, for errors.
        stop_ids: tokens that end an answer, beside those that the server knows.

    Raises:
        FastDraftError: by every call: the server does not answer, or not as this engine does.
    """

    engine: str

    def __init__(self, url: str, key: str = "server", stop_ids: Sequence[int] = ()) -> None:
        self.url, self._key = server_url(url, key).removesuffix("/v1"), key
        self._stop_ids = list(stop_ids)
        self._open = urllib.request.build_opener(_NoRedirect).open

    @abstractmethod
    def answer(self, prompt: Sequence[int], tokens: int, temperature: float = 0.0) -> Answer:
        """Continue a prompt; temperature 0 is greedy. Without a seed: vLLM samples faster."""

    def decode(self, task: str, key: str, prompt: Sequence[int], tokens: int) -> DecodingRecord:
        """Answer a prompt greedily. γ is the caller's to fill in."""
        # A server that has idled takes up to a second longer, and the servers of a comparison idle
        # in turn. So a short answer that is not timed wakes it.
        self.answer(prompt[:1], 8)
        before, start = self._counted(), time.perf_counter()
        found = self.answer(prompt, tokens)
        seconds = time.perf_counter() - start
        drafted, accepted = (b - a for a, b in zip(before, self._counted(), strict=True))
        return DecodingRecord(
            self.engine,
            task,
            key,
            temperature=0.0,
            num_assistant_tokens=0,
            tokens=found.ids,
            seconds=seconds,
            target_passes=len(found.ids) - found.accepted - accepted,
            drafted=found.drafted + drafted,
            accepted=found.accepted + accepted,
            first_token_seconds=found.first_token_seconds,
        )

    def _counted(self) -> tuple[int, int]:
        """Return tokens drafted and accepted so far, where answers do not say it."""
        return 0, 0

    def lines(self, path: str, body: dict[str, Any] | None = None) -> Iterator[bytes]:
        """Send a request and yield the lines of its answer."""
        key = os.environ.get(KEY_VARIABLE)
        request = urllib.request.Request(
            self.url + path,
            None if body is None else json.dumps(body).encode(),
            {"Content-Type": "application/json"}
            | ({"Authorization": f"Bearer {key}"} if key else {}),
        )
        try:
            with self._open(request, timeout=TIMEOUT) as response:
                while line := response.readline(MOST_BYTES):
                    if len(line) == MOST_BYTES:
                        raise FastDraftError(f"{self._key}: {self.url}{path}: an endless answer")
                    yield line
        except urllib.error.HTTPError as error:
            said = " ".join(error.read(2000).decode(errors="replace").split())
            raise FastDraftError(
                f"{self._key}: {self.url}{path}: HTTP {error.code}: "
                f"{said.replace(key, '***') if key else said}"
            ) from None
        except (OSError, http.client.HTTPException) as error:
            raise FastDraftError(
                f"{self._key}: {self.url} does not answer ({error}). Start the server or correct "
                "the URL, and run again; finished answers are kept"
            ) from None

    def first_of(self, name: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """Return the first of a list in a JSON answer."""
        answer = b"".join(self.lines(path, body))
        try:
            found: dict[str, Any] = json.loads(answer)[name][0]
        except (ValueError, LookupError, TypeError):
            raise FastDraftError(
                f"{self._key}: {self.url}{path} does not answer as {self.engine} does"
            ) from None
        return found

    def events(self, path: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Yield the parts of a streamed answer."""
        for line in self.lines(path, body):
            if not line.startswith(b"data:") or line[5:].strip() == b"[DONE]":
                continue
            try:
                event: dict[str, Any] = json.loads(line[5:])
            except ValueError:
                event = {"error": "no JSON"}
            if "error" in event:
                raise FastDraftError(f"{self._key}: {self.url}{path}: {event['error']}")
            yield event


class VLLMClient(Client):
    """vLLM, through OpenAI's completions API.

    It counts drafted tokens over all its requests, so that nobody else may use it meanwhile.
    """

    engine = "vllm"

    def __init__(self, url: str, key: str = "server", stop_ids: Sequence[int] = ()) -> None:
        super().__init__(url, key, stop_ids)
        self._model = self.first_of("data", "/v1/models").get("id")

    def prompt_logprobs(self, prompt: Sequence[int], k: int) -> list[dict[str, Any]]:
        """Return ``{id: {"logprob": …}}`` for every token of a prompt; nothing for the first."""
        body = {"model": self._model, "prompt": list(prompt), "max_tokens": 1, "prompt_logprobs": k}
        found = self.first_of("choices", "/v1/completions", body).get("prompt_logprobs")
        if not isinstance(found, list) or len(found) != len(prompt):
            raise FastDraftError(f"{self._key}: {self.url} returns no log-probabilities of prompts")
        return [position or {} for position in found]

    def _counted(self) -> tuple[int, int]:
        text = b"".join(self.lines("/metrics")).decode()
        pattern = r"^vllm:spec_decode_num_%s_tokens_total\S* (\S+)$"
        drafted, accepted = (
            int(sum(map(float, re.findall(pattern % name, text, re.M))))
            for name in ("draft", "accepted")
        )
        return drafted, accepted

    def answer(self, prompt: Sequence[int], tokens: int, temperature: float = 0.0) -> Answer:
        # What is not sent is taken from the target's generation config.
        body = {
            "model": self._model,
            "prompt": list(prompt),
            "max_tokens": tokens,
            "temperature": temperature,
            "top_p": 1.0,
            "top_k": 0,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "stop_token_ids": self._stop_ids,
            "return_token_ids": True,
            "stream": True,
        }
        start, first, ids = time.perf_counter(), 0.0, list[int]()
        for event in self.events("/v1/completions", body):
            for choice in event["choices"]:
                new = choice.get("token_ids")
                if new is None:
                    raise FastDraftError(
                        f"{self._key}: {self.url} returns no token ids; vLLM 0.10.2 and newer does"
                    )
                first = first or time.perf_counter() - start
                ids += new
        return Answer(ids, first)


class ServerReader(DistributionReader):
    """The target on a vLLM server, which returns the k most probable tokens at every position.

    ``k`` is limited by the server's ``--max-logprobs`` (20 by default).
    """

    def __init__(self, url: str, vocab_size: int) -> None:
        self._server, self.vocab_size = VLLMClient(url, "generate.server"), vocab_size

    def top(
        self, texts: Sequence[Sequence[int]], begins: Sequence[int], k: int, temperature: float
    ) -> Iterator[list[TopK]]:
        def one(text: Sequence[int], begin: int) -> list[TopK]:
            # A dictionary for each token of the prompt: the k tokens, and the prompt's own.
            found = self._server.prompt_logprobs(text, k)[begin:]
            rows = [
                sorted((-entry["logprob"], int(token)) for token, entry in position.items())[:k]
                for position in found
            ]
            if not rows:
                return []
            log_probs = -torch.tensor([[value for value, _ in row] for row in rows])
            tail = (1 - log_probs.double().exp().sum(-1)).clamp(min=0).log().clamp(min=FLOOR)
            ids = torch.tensor([[token for _, token in row] for row in rows])
            return [(ids, log_probs, tail.float())]

        with ThreadPoolExecutor(32) as pool:
            yield from pool.map(one, texts, begins)


class LlamaCppClient(Client):
    """The server of llama.cpp, through its own API, which returns token ids."""

    engine = "llama.cpp"

    def answer(self, prompt: Sequence[int], tokens: int, temperature: float = 0.0) -> Answer:
        body = {
            "prompt": list(prompt),
            "n_predict": tokens,
            "temperature": temperature,
            "samplers": ["temperature"],  # no others, such as min_p, which are on by default
            "repeat_penalty": 1.0,
            "cache_prompt": False,
            "return_tokens": True,
            "stream": True,
        }
        start, first, ids = time.perf_counter(), 0.0, list[int]()
        timings: dict[str, Any] = {}
        for event in self.events("/completion", body):
            if new := event.get("tokens"):
                first = first or time.perf_counter() - start
                ids += new
            timings = event.get("timings", timings)
        return Answer(ids, first, timings.get("draft_n", 0), timings.get("draft_n_accepted", 0))


CLIENTS: dict[str, type[Client]] = {"vllm": VLLMClient, "llama.cpp": LlamaCppClient}
