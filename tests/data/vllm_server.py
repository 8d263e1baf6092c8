"""A real HTTP server on loopback that speaks vLLM's protocol, with faults on demand.

It answers as vLLM's OpenAI-compatible server does (`CompletionRequest`, `CompletionResponse` of
vllm/entrypoints/openai/completion): unknown fields are ignored, ids come back with
``return_token_ids``, and the token that stopped a text is the last of its ids.
"""

from __future__ import annotations

import contextlib
import json
import random
import threading
import time
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

# (number of the request from 0, its body) -> what goes wrong, or None
Faults = Callable[[int, dict[str, Any]], "str | None"]
Writer = Callable[[dict[str, Any]], Sequence[int]]


def deterministic(body: dict[str, Any]) -> list[int]:
    """Write ids that depend on the prompt and how it is sampled, and on nothing else."""
    key = (tuple(body["prompt"]), body["temperature"], body["top_p"], body["seed"])
    source = random.Random(str(key if body["temperature"] else key[0]))
    ids = [source.randrange(3, 99) for _ in range(source.randrange(1, 12))]
    return [*ids, body["stop_token_ids"][-1]]


class VLLMServer:
    """Serves until the context is left.

    Args:
        write: what the model writes for a request, before it is cut to max_tokens.
        faults: for completions after the first, which is the engine's probe: ``death`` of the
            server, a ``reset`` connection, an HTTP status, ``truncated`` JSON, or an answer without
            end: ``flood``, ``gzip``, or ``drip``, byte by byte.
        models: names served.
        root: of the models.
        key: the API key that is wanted.
        seconds: a text takes.
        change: edits an answer.
        redirect: where every request is sent on to.
    """

    def __init__(
        self,
        write: Writer = deterministic,
        faults: Faults = lambda number, body: None,
        *,
        models: Sequence[str] = ("target",),
        root: str | None = None,
        key: str | None = None,
        seconds: float = 0.0,
        change: Callable[[dict[str, Any]], None] = lambda answer: None,
        redirect: str | None = None,
    ) -> None:
        self.write, self.faults, self.models, self.root = write, faults, models, root
        self.key, self.seconds, self.change = key, seconds, change
        self.bodies: list[dict[str, Any]] = []
        self.redirect, self.asked = redirect, False
        self.answered = self.in_flight = self.most_in_flight = 0
        self._lock, self._dead = threading.Lock(), False
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args: Any) -> None:
                pass

            def do_GET(self) -> None:
                outer.asked = True
                if outer.redirect:
                    self.send(307, {})
                    return
                models = [{"id": name, "root": outer.root or name} for name in outer.models]
                self.send(200, {"object": "list", "data": models})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with outer._lock:
                    outer.bodies.append(body)
                    outer.in_flight += 1
                    outer.most_in_flight = max(outer.most_in_flight, outer.in_flight)
                    number = len(outer.bodies) - 2
                self.answer(body, outer.faults(number, body) if number >= 0 else None)
                with outer._lock:
                    outer.in_flight -= 1

            def answer(self, body: dict[str, Any], fault: str | None) -> None:
                if fault == "death":
                    outer._dead = True
                if outer._dead or fault == "reset":
                    self.close_connection = True
                elif fault in ("flood", "gzip", "drip"):
                    self.send_response(200)
                    self.send_header("Connection", "close")
                    if fault == "gzip":
                        self.send_header("Content-Encoding", "gzip")
                    self.end_headers()
                    with contextlib.suppress(OSError):
                        while not outer._dead:
                            self.wfile.write(b" " * (1 if fault == "drip" else 1 << 16))
                            time.sleep(0.02 if fault == "drip" else 0)
                elif fault and fault.isdecimal():
                    self.send(int(fault), {"error": {"message": "the prompt is too long"}})
                elif body["model"] not in outer.models:
                    self.send(404, {"error": "no such model"})
                else:
                    time.sleep(outer.seconds)
                    answer = outer._completion(body)
                    outer.change(answer)
                    outer.answered += fault is None
                    self.send(200, answer, half=fault == "truncated")

            def send(self, status: int, value: Any, half: bool = False) -> None:
                if outer.key and self.headers.get("Authorization") != f"Bearer {outer.key}":
                    status = 401
                data = json.dumps(value).encode()
                data = data[: len(data) // 2] if half else data
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                if outer.redirect:
                    self.send_header("Location", outer.redirect + "/models")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}/v1"
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True)

    def __enter__(self) -> VLLMServer:
        self._thread.start()
        return self

    def __exit__(self, *args: Any) -> None:
        self._dead = True
        self._http.shutdown()
        self._http.server_close()

    def _completion(self, body: dict[str, Any]) -> dict[str, Any]:
        ids: list[int] = []
        for token in self.write(body)[: body["max_tokens"]]:
            ids.append(token)
            if token in body["stop_token_ids"]:
                break
        stopped = ids[-1] in body["stop_token_ids"]
        choice: dict[str, Any] = {
            "index": 0,
            "text": "not to be read",
            "finish_reason": "stop" if stopped else "length",
            "stop_reason": ids[-1] if stopped else None,
        }
        if body.get("return_token_ids"):
            choice |= {"token_ids": ids, "prompt_token_ids": body["prompt"]}
        return {"object": "text_completion", "model": body["model"], "choices": [choice]}
