"""vLLM and llama.cpp as servers that run already: real HTTP on loopback, both protocols."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from fastdraft_hf import FastDraftError
from fastdraft_hf.eval.bench import Models, Setting, all_settings, assisted_settings, load_engine
from fastdraft_hf.eval.config import BenchConfig
from fastdraft_hf.eval.prompts import EvaluationPrompt
from fastdraft_hf.eval.servers import CLIENTS, ServerReader

PROMPT = EvaluationPrompt("humaneval", "H/0", (5, 6, 7))
LLAMA = "/completion"


class Fake:
    """Streams 11, 12, … in twos; of each two one was drafted and accepted, of two drafted."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[Any] = []
        self.drafted = 0
        self.fault: Callable[[BaseHTTPRequestHandler], bool] = lambda handler: False
        self.event: Callable[[dict[str, Any]], dict[str, Any]] = lambda event: event
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args: Any) -> None:
                pass

            def do_GET(self) -> None:
                fake.headers.append(self.headers)
                if self.path == "/metrics":
                    totals = {"draft": fake.drafted, "accepted": fake.drafted / 2}
                    self.reply(
                        "".join(
                            f'vllm:spec_decode_num_{name}_tokens_total{{engine="0"}} {value:.1f}\n'
                            for name, value in totals.items()
                        )
                    )
                elif not fake.fault(self):
                    self.reply(json.dumps({"data": [{"id": "served"}]}))

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                fake.bodies.append(body)
                if fake.fault(self):
                    return
                if "prompt_logprobs" in body:
                    rows = [fake.row(token) for token in body["prompt"]]
                    self.reply(json.dumps({"choices": [{"prompt_logprobs": [None, *rows[1:]]}]}))
                    return
                longest = body.get("max_tokens", body.get("n_predict"))
                ids = list(range(11, 11 + longest))
                pairs = [ids[at : at + 2] for at in range(0, longest, 2)]
                fake.drafted += 2 * len(pairs)
                events: list[dict[str, Any]] = []
                for pair in pairs:
                    llama = {"content": "x", "tokens": pair}
                    choice = {"index": 0, "text": "x", "token_ids": pair}
                    events.append(llama if self.path == LLAMA else {"choices": [choice]})
                if self.path == LLAMA:
                    counts = {"draft_n": 2 * len(pairs), "draft_n_accepted": len(pairs)}
                    events.append({"content": "", "tokens": [], "timings": counts})
                else:
                    assert body["model"] == "served"
                lines = [f"data: {json.dumps(fake.event(event))}\n\n" for event in events]
                self.reply("".join([*lines, "data: [DONE]\n\n"]))

            def reply(self, text: str, status: int = 200, **headers: str) -> None:
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(text.encode())

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()

    @staticmethod
    def row(token: int) -> dict[str, Any]:
        """Three likely tokens, and the prompt's own, as vLLM lists them."""
        chances = {3: 0.5, 4: 0.3, 5: 0.1, token: 0.01}
        return {str(one): {"logprob": math.log(chance)} for one, chance in chances.items()}


@pytest.fixture
def fake() -> Iterator[Fake]:
    server = Fake()
    yield server
    server.http.shutdown()
    server.http.server_close()


@pytest.mark.parametrize("engine", CLIENTS)
def test_an_answer_is_read_as_it_was_generated(engine: str, fake: Fake) -> None:
    server = CLIENTS[engine](fake.url + "/v1/", stop_ids=[2])
    record = server.decode(PROMPT.task, PROMPT.key, PROMPT.ids, 6)
    assert record.tokens == [11, 12, 13, 14, 15, 16]
    assert (record.drafted, record.accepted, record.target_passes) == (6, 3, 3)
    assert 0 < (record.first_token_seconds or 0) <= record.seconds
    body = fake.bodies[-1]
    # Nothing is left to the model's generation config or to the engine's own defaults.
    assert (body["prompt"], body["temperature"], body["stream"]) == ([5, 6, 7], 0.0, True)
    assert body["top_p"] == 1.0 if engine == "vllm" else body["samplers"] == ["temperature"]


@pytest.mark.parametrize("engine", CLIENTS)
def test_bench_times_a_server_with_the_draft_and_one_without(engine: str, fake: Fake) -> None:
    other = Fake()
    models = Models("target", server=fake.url, server_alone=other.url)
    settings = all_settings(assisted_settings([engine], [3]))
    assert settings == [Setting(engine), Setting(engine, 3)]
    decode = load_engine(models, settings)
    records = [decode(setting, PROMPT, 4) for setting in settings]
    assert [record.num_assistant_tokens for record in records] == [0, 3]
    # Each was woken, and then timed.
    assert [len(one.bodies) for one in (other, fake)] == [2, 2]
    other.http.shutdown()


def test_a_key_is_sent_and_never_shown(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "very-secret")

    def refuse(handler: Any) -> bool:
        handler.reply(f"no such key: {handler.headers['Authorization']}", 401)
        return True

    fake.fault = refuse
    with pytest.raises(FastDraftError, match=r"bench.server: .*HTTP 401: no such key") as error:
        CLIENTS["vllm"](fake.url, "bench.server")
    assert fake.headers[-1]["Authorization"] == "Bearer very-secret"
    assert "very-secret" not in str(error.value)


def test_a_redirect_is_not_followed(fake: Fake) -> None:
    other = Fake()
    fake.fault = lambda handler: bool(
        handler.reply("", 302, Location=other.url) or True  # type: ignore[attr-defined]
    )
    with pytest.raises(FastDraftError, match="HTTP 302"):
        CLIENTS["vllm"](fake.url)
    assert not other.headers
    other.http.shutdown()


@pytest.mark.parametrize(
    ("engine", "event", "said"),
    [
        ("vllm", lambda event: {"choices": [{"index": 0, "text": "x"}]}, "no token ids"),
        ("vllm", lambda event: {"error": {"message": "out of memory"}}, "out of memory"),
        ("llama.cpp", lambda event: {"error": {"message": "too long"}}, "too long"),
    ],
)
def test_an_answer_that_is_none(engine: str, event: Any, said: str, fake: Fake) -> None:
    server = CLIENTS[engine](fake.url)
    fake.event = event
    with pytest.raises(FastDraftError, match=said):
        server.answer([1, 2], 4)


def test_no_server() -> None:
    with pytest.raises(FastDraftError, match=r"bench.server: http://127.0.0.1:9 does not answer"):
        CLIENTS["vllm"]("http://127.0.0.1:9", "bench.server")


def test_the_distribution_of_a_text(fake: Fake) -> None:
    found = list(ServerReader(fake.url, 99).top([[7, 8, 9], [6, 7]], [1, 2], k=2, temperature=1.0))
    ((ids, log_probs, tail),) = found[0]
    assert ids.tolist() == [[3, 4], [3, 4]]
    assert log_probs.exp().tolist() == [pytest.approx([0.5, 0.3])] * 2
    assert tail.exp().tolist() == pytest.approx([0.2, 0.2])
    assert found[1] == []  # nothing after the prompt
    reader = ServerReader(fake.url, 99)
    fake.fault = lambda handler: handler.reply('{"choices": [{}]}') is None  # type: ignore
    with pytest.raises(FastDraftError, match="no log-probabilities of prompts"):
        list(reader.top([[7, 8]], [1], k=2, temperature=1.0))
    with pytest.raises(FastDraftError, match="/v1/models does not answer as vllm does"):
        ServerReader(fake.url, 99)


URLS = {"server": "http://127.0.0.1:8000", "server_alone": "http://127.0.0.1:8001"}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"paths": ["vllm"]}, "server: paths vllm and llama.cpp need it"),
        ({"paths": ["vllm"], "server": URLS["server"]}, "server_alone: paths vllm"),
        ({"paths": ["ours"], **URLS}, "no other path does"),
        ({"paths": ["vllm"], **URLS}, "one γ"),
        ({"paths": ["vllm", "llama.cpp"], **URLS, "num_assistant_tokens": [3]}, "one engine"),
        ({"paths": ["vllm"], **URLS, "server": "http://u:pw@host"}, "more than host and path"),
    ],
)
def test_settings_that_do_not_go_together(given: dict[str, Any], said: str) -> None:
    with pytest.raises(FastDraftError, match=said):
        BenchConfig(**given)
    BenchConfig(paths=["vllm"], num_assistant_tokens=[3], **URLS)
