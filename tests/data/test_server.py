"""The server engine against a real HTTP server on loopback that speaks vLLM's protocol."""

import gc
import logging
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai._base_client
import pytest

from fastdraft_hf._errors import FastDraftError
from fastdraft_hf.data.engines import Request
from fastdraft_hf.data.engines import server as module
from fastdraft_hf.data.engines.server import ServerEngine, server_url
from fastdraft_hf.data.parts import iter_rows, write_rows

from .vllm_server import VLLMServer, deterministic

STOP = {0, 2}


@pytest.fixture(autouse=True)
def _quick_retries(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(openai._base_client, "INITIAL_RETRY_DELAY", 0.01)
    monkeypatch.setattr(openai._base_client, "MAX_RETRY_DELAY", 0.05)
    return


def make_requests(count: int) -> list[Request]:
    return [
        Request(i, (5, i % 7, 9), (0.0, 0.6, 1.0)[i % 3], 50 + i, (4, 30)[i % 2], "s", top_p=0.9)
        for i in range(count)
    ]


def expected(request: Request) -> tuple[int, ...]:
    body = {
        "prompt": list(request.prompt_ids),
        "temperature": request.temperature,
        "top_p": request.top_p,
        "seed": request.seed,
        "stop_token_ids": sorted(STOP),
    }
    return tuple(deterministic(body)[: request.max_new_tokens])


def open_engine(server: VLLMServer, **settings: Any) -> ServerEngine:
    given: dict[str, Any] = {"batch_size": 8, "target": "target", "vocab_size": 100, **settings}
    return ServerEngine(server.url, STOP, **given)


def check(engine: ServerEngine, count: int = 40) -> None:
    requests, tokens = make_requests(count), list[int]()
    done = {c.request.index: c for c in engine.generate(iter(requests), tokens.append)}
    assert sorted(done) == list(range(count))
    for request in requests:
        assert done[request.index].request == request
        assert done[request.index].ids == expected(request)
        stopped = done[request.index].ids[-1] in STOP
        assert done[request.index].finish_reason == ("stop" if stopped else "length")
    assert sum(tokens) == sum(len(expected(r)) for r in requests)


def test_ids_go_out_and_come_back() -> None:
    with VLLMServer(seconds=0.05) as server:
        check(open_engine(server))
        assert 4 < server.most_in_flight <= 8
        body = next(b for b in server.bodies[1:] if b["prompt"] == [5, 1, 9] and b["seed"] == 51)
        # Whatever is not sent, vLLM takes from the model's generation config.
        sent = {k: body[k] for k in ("temperature", "top_p", "top_k", "min_p", "max_tokens", "n")}
        assert sent == {
            "temperature": 0.6,
            "top_p": 0.9,
            "top_k": 0,
            "min_p": 0.0,
            "max_tokens": 30,
            "n": 1,
        }
        assert body["repetition_penalty"] == 1.0
        assert body["presence_penalty"] == body["frequency_penalty"] == 0.0
        assert body["stop_token_ids"] == [0, 2]
        assert body["return_token_ids"] is True


def test_every_fault_at_random() -> None:
    kinds = ["500", "429", "reset", "truncated"]
    tries: Counter[int] = Counter()

    def faults(number: int, body: Any) -> str | None:
        # Drawn by request and try, since the order in which requests arrive is another each time.
        tries[body["seed"]] += 1
        source = random.Random(f"{body['seed']} {tries[body['seed']]}")
        return source.choice(kinds) if source.random() < 0.2 else None

    with VLLMServer(faults=faults) as server:
        check(open_engine(server), 120)
    assert tries.total() > 140


def test_a_server_that_dies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RETRIES", 2)
    requests = make_requests(40)
    with (
        VLLMServer(faults=lambda number, body: "death" if number == 25 else None) as server,
        pytest.raises(FastDraftError, match=r"does not answer \(.*finished rows are kept"),
    ):
        write_rows(open_engine(server), requests, tmp_path / "set")
    answered = server.answered - 1
    assert 15 <= answered < 40
    with VLLMServer() as server:
        write_rows(open_engine(server), requests, tmp_path / "set")
        # Only what was answered as the error came is requested again.
        assert len(server.bodies) - 1 <= 40 - answered + 8
    rows = list(iter_rows(tmp_path / "set"))
    assert [tuple(row["completion_ids"]) for row in rows] == [expected(r) for r in requests]
    assert [row["top_p"] for row in rows] == pytest.approx([0.9] * 40)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"token_ids": None}, r"returns no token ids.*0\.10\.2"),
        ({"prompt_token_ids": [1, 2, 2]}, "it changed the prompt"),
        ({"token_ids": [], "finish_reason": "stop", "stop_reason": 77}, "stop_reason 77"),
        ({"token_ids": [], "finish_reason": "length"}, "ended after 0 of 1 tokens"),
        ({"token_ids": [100]}, "returned token id 100, and the target's vocabulary has 100 ids"),
        ({"token_ids": [-7]}, "returned token id -7"),
        ({"token_ids": [True]}, "returned token id True"),
        ({"token_ids": "5"}, "returns no token ids"),
        ({"prompt_token_ids": 5}, "it changed the prompt"),
    ],
)
def test_answers_that_are_refused(change: dict[str, Any], message: str) -> None:
    with (
        VLLMServer(change=lambda answer: answer["choices"][0].update(change)) as server,
        pytest.raises(FastDraftError, match=message),
    ):
        open_engine(server)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("flood", "an answer of more than 1 MiB"),
        ("gzip", "an answer of .*or a compressed one"),
        ("drip", r"an answer was not complete after 0\.5 seconds"),
    ],
)
def test_an_answer_without_end(
    fault: str,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(module, "MOST_BYTES", 1 << 20)
    monkeypatch.setattr(module, "TIMEOUT", 0.5)
    with VLLMServer(faults=lambda number, body: fault) as server:
        engine, started = open_engine(server), time.monotonic()
        with pytest.raises(FastDraftError, match=rf"does not answer \({message}.*rows are kept"):
            list(engine.generate(make_requests(3), lambda n: None))
        assert time.monotonic() - started < 10
    del engine
    gc.collect()  # asyncio reports errors that nobody looked at as it drops them
    assert not [record for record in caplog.records if record.name == "asyncio"]


def test_a_stop_token_left_out_is_put_back() -> None:
    def change(answer: dict[str, Any]) -> None:
        choice = answer["choices"][0]
        if choice["finish_reason"] == "stop":
            choice["token_ids"] = choice["token_ids"][:-1]

    with VLLMServer(change=change) as server:
        check(open_engine(server))


@pytest.mark.parametrize(
    ("models", "root", "target", "model", "found"),
    [
        (["HuggingFaceTB/SmolLM2"], None, "HuggingFaceTB/SmolLM2", None, "HuggingFaceTB/SmolLM2"),
        (["x"], "/models/SmolLM2/", "HuggingFaceTB/SmolLM2", None, "x"),
        (["other", "SmolLM2"], "o", "/here/smollm2", None, "SmolLM2"),
        (["other"], None, "SmolLM2", "other", "other"),
        (["other"], None, "SmolLM2", None, "serves other, and none is called SmolLM2.*server_mod"),
        (["other"], None, "SmolLM2", "third", "serves other, and none is called third"),
        ([], None, "SmolLM2", None, "serves no model"),
    ],
)
def test_the_models_name(
    models: list[str], root: str | None, target: str, model: str | None, found: str
) -> None:
    with VLLMServer(models=models, root=root) as server:
        if "serves" in found:
            with pytest.raises(FastDraftError, match=found):
                open_engine(server, target=target, model=model)
        else:
            open_engine(server, target=target, model=model)
            assert server.bodies[0]["model"] == found


def test_the_key_comes_from_the_environment_only(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with VLLMServer(key="sesame-9") as server, caplog.at_level(logging.DEBUG):
        monkeypatch.delenv("VLLM_API_KEY", raising=False)
        with pytest.raises(FastDraftError, match=r"does not accept the key .*VLLM_API_KEY"):
            open_engine(server)
        monkeypatch.setenv("VLLM_API_KEY", "sesame-9")
        check(open_engine(server))
        server.faults = lambda number, body: "400"
        refused = r"refuses the request \(HTTP 400\): .*the prompt is too long"
        with pytest.raises(FastDraftError, match=refused) as error:
            list(open_engine(server).generate(make_requests(2), lambda n: None))
        assert "sesame-9" not in str(error.value) + caplog.text


def test_a_wrong_address() -> None:
    with VLLMServer() as gone:
        pass
    with pytest.raises(
        FastDraftError, match=r"generate\.server: http://.* does not answer \(.*Conn"
    ):
        open_engine(gone)


def test_a_hanging_server_does_not_block_leaving() -> None:
    end = threading.Event()

    def write(body: dict[str, Any]) -> list[int]:
        if body["seed"] > 51:
            end.wait(60)
        return deterministic(body)

    with VLLMServer(write) as server:
        engine = open_engine(server)
        rows = engine.generate(make_requests(30), lambda n: None)
        assert next(rows).request.index in (0, 1)
        rows.close()  # returns, though six requests are in flight
        # So does a caller whose time is up.
        assert len(list(engine.generate(make_requests(30), lambda n: True))) <= 2
        end.set()


def test_urls() -> None:
    for text in ("http://host:8000", "http://host:8000/v1/", " http://host:8000/ "):
        assert server_url(text) == "http://host:8000/v1"
    assert server_url("https://host/some/path") == "https://host/some/path/v1"


@pytest.mark.parametrize("text", ["http://me:sesame@host/v1", "http://host/v1?key=sesame"])
def test_no_secrets_in_urls(text: str) -> None:
    with pytest.raises(FastDraftError, match="VLLM_API_KEY") as error:
        server_url(text)
    assert "sesame" not in str(error.value)


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "openai", None)
    with pytest.raises(FastDraftError, match=r"pip install fastdraft_hf\[server\]"):
        ServerEngine("http://host", STOP, vocab_size=100)


def test_a_redirect_is_not_followed() -> None:
    with VLLMServer() as other, VLLMServer(redirect=other.url) as server:
        with pytest.raises(FastDraftError, match=r"refuses the request \(HTTP 307\)"):
            open_engine(server)
        assert not other.asked
