"""Engines through which the target generates: one small interface, several speeds."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from fastdraft_hf._errors import FastDraftError
from fastdraft_hf._extras import openvino_available

EngineName = Literal["auto", "openvino", "transformers", "vllm", "server"]


@dataclass(frozen=True)
class Request:
    """One completion to generate. ``prompt_ids`` are used exactly as they are.

    Attributes:
        index: number of the row in its set.
        temperature: 0 is greedy.
        top_p: nucleus to sample from; 1 is the whole distribution.
        sample: number among the completions of one prompt at one temperature.
    """

    index: int
    prompt_ids: tuple[int, ...]
    temperature: float
    seed: int
    max_new_tokens: int
    source: str
    top_p: float = 1.0
    sample: int = 0

    @property
    def prompt_hash(self) -> str:
        """A short digest of the prompt's ids, equal for rows of one prompt."""
        data = b"".join(i.to_bytes(4, "little") for i in self.prompt_ids)
        return hashlib.sha256(data).hexdigest()[:16]


@dataclass(frozen=True)
class Completion:
    """The completion of one request: token ids as generated, never tokenized from text."""

    request: Request
    ids: tuple[int, ...]
    finish_reason: Literal["stop", "length"]


class Engine(Protocol):
    """Generates completions and yields them in any order, one per request."""

    name: str

    def generate(
        self, requests: Iterable[Request], on_tokens: Callable[[int], bool | None]
    ) -> Iterator[Completion]:
        """Yield one completion per request.

        Args:
            requests: read lazily; it may end early.
            on_tokens: called with the number of new tokens as they appear. If it returns True, the
                time is up: yield the beginnings of unfinished completions, if any, and return.
        """
        ...


def completed(request: Request, ids: Sequence[int], stop_ids: Collection[int]) -> Completion:
    """Return the completion that ends at the first stop token or at the length limit."""
    ids = ids[: request.max_new_tokens]
    for position, token in enumerate(ids):
        if token in stop_ids:
            return Completion(request, tuple(ids[: position + 1]), "stop")
    return Completion(request, tuple(ids), "length")


def checked(
    request: Request,
    ids: Sequence[int],
    finish_reason: str | None,
    stop_reason: object,
    stop_ids: Collection[int],
    vocab_size: int,
    where: str,
) -> Completion:
    """Return the completion that another program generated, if it is what was requested.

    Args:
        request: what was requested.
        ids: what was generated.
        finish_reason: ``stop`` or ``length``.
        stop_reason: the id of the stop token, which some versions leave out of ``ids``.
        stop_ids: token ids that end a completion.
        vocab_size: ids are below it.
        where: names the program, for messages.

    Raises:
        FastDraftError: ids outside the vocabulary, another stop token, or a length limit of the
            program's own.
    """
    for token in ids:
        if type(token) is not int or not 0 <= token < vocab_size:
            raise FastDraftError(
                f"{where}: it returned token id {token!r}, and the target's vocabulary has "
                f"{vocab_size} ids. Is it the same model?"
            )
    done = completed(request, ids, stop_ids)
    if finish_reason == "stop" and done.finish_reason == "length":
        if isinstance(stop_reason, int) and stop_reason in stop_ids:
            return Completion(request, (*done.ids, stop_reason), "stop")
        raise FastDraftError(
            f"{where}: a completion was stopped by something other than the target's own end "
            f"tokens (stop_reason {stop_reason!r}). Is it the same model and generation config?"
        )
    if done.finish_reason == "length" and len(done.ids) < request.max_new_tokens:
        raise FastDraftError(
            f"{where}: a completion ended after {len(done.ids)} of {request.max_new_tokens} tokens "
            f"({finish_reason}). With a prompt of {len(request.prompt_ids)} tokens it may not fit "
            "the server's --max-model-len"
        )
    return done


def choose_engine(
    name: EngineName, device: str, servers: Sequence[str] = ()
) -> Literal["openvino", "transformers", "vllm", "server"]:
    """Resolve ``auto``: a server if one is named, else transformers on a GPU, OpenVINO on a CPU.

    Args:
        name: ``generate.engine``.
        device: ``cpu`` or ``cuda``.
        servers: URLs of servers.

    Raises:
        FastDraftError: the engine is not installed, ``server`` has no URL, or another engine has
            one.
    """
    if name == "openvino" and not openvino_available():
        raise FastDraftError(
            "generate.engine: openvino is not installed; `pip install fastdraft_hf[openvino]`"
        )
    if name == "server" and not servers:
        raise FastDraftError(
            "generate.server: engine server needs the URL of an OpenAI-compatible server, such as "
            "http://host:8000/v1"
        )
    if servers and name not in ("auto", "server"):
        raise FastDraftError(
            f"generate.server: engine {name} does not use a server; set generate.engine to server"
        )
    if name != "auto":
        return name
    if servers:
        return "server"
    return "openvino" if openvino_available() and device == "cpu" else "transformers"


def open_engine(
    name: Literal["openvino", "transformers", "vllm"],
    *,
    target: Path,
    openvino_target: Path | None,
    stop_ids: set[int],
    batch_size: int,
    device: str,
) -> Engine:
    """Load the target into an engine of this process.

    Args:
        name: of the engine.
        target: the target's Hugging Face folder.
        openvino_target: its OpenVINO folder, for ``openvino`` only.
        stop_ids: token ids that end a completion.
        batch_size: completions generated at once.
        device: ``cpu``, ``cuda`` or ``cuda:N``. OpenVINO runs on the CPU.
    """
    if name == "openvino":
        from fastdraft_hf.data.engines.openvino import OpenVINOEngine

        if openvino_target is None:
            raise ValueError("the openvino engine needs openvino_target")
        return OpenVINOEngine(openvino_target, stop_ids, batch_size)
    if name == "vllm":
        from fastdraft_hf.data.engines.vllm import VLLMEngine

        return VLLMEngine(target, stop_ids, batch_size, device)
    from fastdraft_hf.data.engines.transformers import TransformersEngine

    return TransformersEngine(target, stop_ids, batch_size, device)
