"""HTTP to an OpenAI-compatible server: a request with its faults sorted, a server's health."""

from __future__ import annotations

import os
import random
import time
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from fastdraft_hf._errors import FastDraftError

# The only place a key comes from: recipes, logs and errors never hold it.
KEY_VARIABLE = "VLLM_API_KEY"


class ServerTrouble(Exception):
    """A fault that may pass: an overloaded, restarting or dying server, a broken connection.

    Attributes:
        wait: seconds the server asked to wait, if it did.
    """

    def __init__(self, message: str, wait: float | None = None) -> None:
        super().__init__(message)
        self.wait = wait


def server_url(text: str) -> str:
    """Return the base URL of a server, ending in ``/v1``.

    Raises:
        FastDraftError: it is no http(s) URL, or it holds a password.
    """
    parts = urlsplit(text.strip())
    if parts.scheme not in ("http", "https") or not parts.hostname:
        shown = "a text with a password" if "@" in text else f"'{text}'"
        raise FastDraftError(f"generate.server: {shown} is no URL such as http://host:8000/v1")
    if parts.username or parts.password or parts.query:
        raise FastDraftError(
            f"generate.server: the URL of {parts.hostname} holds more than host and path; a key "
            f"belongs into the environment variable {KEY_VARIABLE}"
        )
    path = parts.path.rstrip("/")
    return f"{parts.scheme}://{parts.netloc}{path if path.endswith('/v1') else path + '/v1'}"


@dataclass(frozen=True)
class Patience:
    """How long a failing server is borne with.

    Attributes:
        failures: failures in a row, with nothing answered between, after which it counts as dead.
        first_wait: seconds before the first new try; they double.
        longest_wait: seconds at most.
        timeout: seconds that one answer may take.
    """

    failures: int = 12
    first_wait: float = 0.5
    longest_wait: float = 30.0
    timeout: float = 1800.0

    def wait(self, failures: int) -> float:
        """Return seconds to wait after so many failures, drawn at random around a doubling time.

        The draw keeps many clients from coming back in one moment.
        """
        longest = min(self.longest_wait, self.first_wait * 2 ** (failures - 1))
        return float(longest * random.uniform(0.5, 1.0))


class Server:
    """One server. Only `call` may be used by several threads.

    Args:
        url: of `server_url`.
        patience: with failures.
        connections: requests at once.
    """

    def __init__(self, url: str, patience: Patience, connections: int) -> None:
        import httpx

        self.url, self.patience = url, patience
        self.model = ""
        self.in_flight = 0
        self.failures = 0
        self.not_before = 0.0
        self.last_fault = ""
        self._key = os.environ.get(KEY_VARIABLE, "")
        # No redirect is followed: another host must not be given the key.
        self._client = httpx.Client(
            headers={"Authorization": f"Bearer {self._key}"} if self._key else {},
            timeout=httpx.Timeout(patience.timeout, connect=min(10.0, patience.timeout)),
            limits=httpx.Limits(max_connections=connections, max_keepalive_connections=connections),
            follow_redirects=False,
        )

    @property
    def dead(self) -> bool:
        return self.failures >= self.patience.failures

    def failed(self, begun: float, trouble: ServerTrouble) -> None:
        """Note a fault of a request that was sent at time ``begun``.

        Requests that were in flight together fail together: they count once.
        """
        self.last_fault = str(trouble)
        if begun < self.not_before:
            return
        self.failures += 1
        wait = self.patience.wait(self.failures) if trouble.wait is None else trouble.wait
        self.not_before = time.monotonic() + min(wait, 600.0)

    def answered(self) -> None:
        self.failures = 0
        self.not_before = 0.0

    def close(self) -> None:
        self._client.close()

    def call(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """GET ``path``, or POST ``body`` to it; return the JSON object of the answer.

        Raises:
            ServerTrouble: a fault that may pass.
            FastDraftError: the server refuses the request.
        """
        import httpx

        try:
            if body is None:
                response = self._client.get(self.url + path)
            else:
                response = self._client.post(self.url + path, json=body)
        except httpx.TimeoutException as error:
            raise ServerTrouble(f"no answer in time ({type(error).__name__})") from None
        except httpx.HTTPError as error:
            raise ServerTrouble(self._clean(f"{type(error).__name__}: {error}")) from None
        status = response.status_code
        if status in (408, 425, 429) or status >= 500:
            raise ServerTrouble(f"HTTP {status}", _retry_after(response.headers.get("retry-after")))
        if status in (401, 403):
            raise FastDraftError(
                f"{self.url}: it wants another key (HTTP {status}); set {KEY_VARIABLE}"
            )
        if status != 200:
            said = " ".join(self._clean(response.text).split())[:300]
            raise FastDraftError(f"{self.url}{path}: refused with HTTP {status}: {said}")
        try:
            answer = response.json()
        except ValueError:
            raise ServerTrouble("an answer that is no whole JSON") from None
        if not isinstance(answer, dict):
            raise ServerTrouble("an answer that is no JSON object")
        return answer

    def _clean(self, text: str) -> str:
        return text.replace(self._key, "***") if self._key else text


def _retry_after(value: str | None) -> float | None:
    """Read a Retry-After header; dates are left to our own waiting."""
    try:
        return max(0.0, float(value)) if value else None
    except ValueError:
        return None
