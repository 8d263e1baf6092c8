"""A real HTTP server on loopback that speaks vLLM's protocol, with faults on demand.

It answers as vLLM's OpenAI-compatible server does (`CompletionRequest`, `CompletionResponse` of
vllm/entrypoints/openai/completion): unknown fields are ignored, ids come back with
``return_token_ids``, and the token that stopped a text is the last of its ids.
"""

from __future__ import annotations

import json
import random
import socket
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
    """Serves until `stop`; use as a context manager.

    Args:
        write: what the model writes for a request, before it is cut to max_tokens.
        faults: for completions after the first, which is the engine's probe.
        models: names served.
        root: of the first model.
        key: the API key that is wanted.
        returns_ids: whether return_token_ids is known, as in vLLM 0.10.2 and newer.
        seconds: a text takes.
    """

    def __init__(
        self,
        write: Writer = deterministic,
        faults: Faults = lambda number, body: None,
        *,
        models: Sequence[str] = ("target",),
        root: str | None = None,
        key: str | None = None,
        returns_ids: bool = True,
        seconds: float = 0.0,
        change: Callable[[dict[str, Any]], None] = lambda answer: None,
    ) -> None:
        self.write, self.faults, self.models, self.key = write, faults, models, key
        self.root, self.returns_ids, self.seconds, self.change = root, returns_ids, seconds, change
        self.bodies: list[dict[str, Any]] = []
        self.answered = self.in_flight = self.most_in_flight = 0
        self._lock = threading.Lock()
        self._dead = threading.Event()
        self._connections: set[socket.socket] = set()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args: Any) -> None:
                pass

            def do_GET(self) -> None:
                outer._models(self)

            def do_POST(self) -> None:
                outer._completions(self)

            def setup(self) -> None:
                super().setup()
                outer._connections.add(self.connection)

        class Quiet(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 256

            def handle_error(self, request: Any, client_address: Any) -> None:
                pass  # connections are broken on purpose

        self._http = Quiet(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}/v1"
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True)

    def __enter__(self) -> VLLMServer:
        self._thread.start()
        return self

    def __exit__(self, *args: Any) -> None:
        self.stop()

    def stop(self) -> None:
        """Die: no new connection is taken, and open ones are reset."""
        if self._dead.is_set():
            return
        self._dead.set()
        self._http.shutdown()
        self._http.server_close()
        for connection in list(self._connections):
            reset(connection)

    def _send(self, handler: Any, status: int, value: Any, **headers: str) -> None:
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        handler.send_response(status)
        for name, text in headers.items():
            handler.send_header(name.replace("_", "-"), text)
        handler.send_header("Content-Type", "application/json")
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data)

    def _refused(self, handler: Any) -> bool:
        if self.key is None or handler.headers.get("Authorization") == f"Bearer {self.key}":
            return False
        self._send(handler, 401, {"error": "Unauthorized"})
        return True

    def _models(self, handler: Any) -> None:
        if self._refused(handler):
            return
        data = [{"id": name, "object": "model", "root": self.root or name} for name in self.models]
        self._send(handler, 200, {"object": "list", "data": data})

    def _completions(self, handler: Any) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        if self._refused(handler):
            return
        with self._lock:
            number = len(self.bodies)
            self.bodies.append(body)
            self.in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            self._answer(handler, body, number)
        finally:
            with self._lock:
                self.in_flight -= 1

    def _answer(self, handler: Any, body: dict[str, Any], number: int) -> None:
        fault = self.faults(number - 1, body) if number else None
        if fault == "death":
            threading.Thread(target=self.stop).start()
            self._dead.wait()
        if self._dead.is_set() or fault == "reset":
            return reset(handler.connection)
        if fault == "429":
            return self._send(handler, 429, {"error": "busy"}, Retry_After="0.05")
        if fault == "500":
            return self._send(handler, 500, {"error": "internal"})
        if fault == "400":
            return self._send(handler, 400, {"error": {"message": "the prompt is too long"}})
        if body["model"] not in self.models:
            return self._send(handler, 404, {"error": "no such model"})
        time.sleep(self.seconds)
        answer = self._completion(body)
        self.change(answer)
        data = json.dumps(answer).encode()
        if fault == "truncated":  # a whole HTTP answer whose JSON is not
            data = data[: len(data) // 2]
        if fault == "short":  # less than Content-Length says, then the end
            head = "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 99999"
            handler.wfile.write(f"{head}\r\n\r\n".encode() + data)
            handler.wfile.flush()
            return reset(handler.connection)
        self._send(handler, 200, data)
        if fault is None:
            with self._lock:
                self.answered += 1
        return None

    def _completion(self, body: dict[str, Any]) -> dict[str, Any]:
        stop = set(body["stop_token_ids"])
        ids: list[int] = []
        for token in self.write(body):
            ids.append(token)
            if token in stop or len(ids) == body["max_tokens"]:
                break
        stopped = ids[-1] in stop
        choice: dict[str, Any] = {
            "index": 0,
            "text": "not to be read",
            "logprobs": None,
            "finish_reason": "stop" if stopped else "length",
            "stop_reason": ids[-1] if stopped else None,
        }
        if self.returns_ids and body.get("return_token_ids"):
            choice |= {"token_ids": ids, "prompt_token_ids": body["prompt"]}
        return {"object": "text_completion", "model": body["model"], "choices": [choice]}


def reset(connection: socket.socket) -> None:
    """Break a connection off, so that the other side sees a reset and no orderly end."""
    try:
        linger = b"\x01\x00\x00\x00\x00\x00\x00\x00"
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        connection.shutdown(socket.SHUT_RDWR)
        connection.close()
    except OSError:
        pass
