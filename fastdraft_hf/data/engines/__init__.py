"""Engines that let the target write: one small interface, several speeds."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from fastdraft_hf._errors import FastDraftError
from fastdraft_hf._extras import openvino_available
from fastdraft_hf.data.requests import Request

EngineName = Literal["auto", "openvino", "transformers", "vllm"]


@dataclass(frozen=True)
class Completion:
    """What the target wrote for one request: token ids as generated, never re-tokenised."""

    request: Request
    ids: tuple[int, ...]
    finish_reason: Literal["stop", "length"]


@dataclass(frozen=True)
class Drafting:
    """A draft that an engine writes with.

    Attributes:
        folder: the draft, in the engine's own format.
        num_assistant_tokens: tokens drafted a round (γ).
        decode: for transformers, a ``custom_generate`` that takes batches. It comes from outside,
            for the package's own belongs to a folder that this one may not import.
    """

    folder: Path
    num_assistant_tokens: int
    decode: Callable[..., Any] | None = None


class Engine(Protocol):
    """Writes completions. Yields them in any order, each request exactly once."""

    name: str

    def generate(
        self, requests: Iterable[Request], on_tokens: Callable[[int], None]
    ) -> Iterator[Completion]:
        """Yield a completion a request; call ``on_tokens(n)`` as tokens appear."""
        ...


def completed(request: Request, ids: Sequence[int], stop_ids: Collection[int]) -> Completion:
    """Return what the target wrote, ended at its first stop token or at the length asked for."""
    ids = ids[: request.max_new_tokens]
    for position, token in enumerate(ids):
        if token in stop_ids:
            return Completion(request, tuple(ids[: position + 1]), "stop")
    return Completion(request, tuple(ids), "length")


def choose_engine(
    name: EngineName, device: str, servers: Sequence[str] = ()
) -> Literal["openvino", "transformers", "vllm"]:
    """Resolve ``auto``: servers if there are any; else transformers on a GPU, OpenVINO on a CPU.

    Args:
        name: what the recipe says.
        device: ``cpu`` or ``cuda``.
        servers: URLs of servers.

    Raises:
        FastDraftError: ``openvino`` is asked for and not installed, ``vllm`` without a server, or
            another engine with one.
    """
    has_openvino = openvino_available()
    if name == "openvino" and not has_openvino:
        raise FastDraftError(
            "generate.engine: openvino is not installed; `pip install fastdraft_hf[openvino]`"
        )
    if name == "vllm" and not servers:
        raise FastDraftError(
            "generate.server: engine vllm needs the URL of a server, such as http://host:8000/v1"
        )
    if servers and name not in ("auto", "vllm"):
        raise FastDraftError(f"generate.engine: {name} has no use for generate.server; take vllm")
    if name != "auto":
        return name
    if servers:
        return "vllm"
    return "openvino" if has_openvino and device == "cpu" else "transformers"


def open_engine(
    name: Literal["openvino", "transformers"],
    *,
    target: Path,
    openvino_target: Path | None,
    stop_ids: set[int],
    batch_size: int,
    device: str,
    draft: Drafting | None = None,
) -> Engine:
    """Load the target into an engine of this machine.

    Args:
        name: which engine.
        target: the target's Hugging Face folder.
        openvino_target: its OpenVINO folder; needed by ``openvino`` only.
        stop_ids: token ids that end a text.
        batch_size: texts written at once.
        device: ``cpu`` or ``cuda``, for ``transformers``; OpenVINO runs on the CPU here.
        draft: drafts for the target, if given.
    """
    if name == "openvino":
        from fastdraft_hf.data.engines.openvino import OpenVINOEngine

        if openvino_target is None:
            raise ValueError("the openvino engine needs openvino_target")
        return OpenVINOEngine(openvino_target, stop_ids, batch_size, draft=draft)
    from fastdraft_hf.data.engines.transformers import TransformersEngine

    return TransformersEngine(target, stop_ids, batch_size, device, draft=draft)
