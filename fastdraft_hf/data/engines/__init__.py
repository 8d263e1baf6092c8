"""Engines that let the target write: one small interface, several speeds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from fastdraft_hf._errors import FastDraftError
from fastdraft_hf._extras import openvino_available
from fastdraft_hf.data.requests import Request

EngineName = Literal["auto", "openvino", "transformers"]


@dataclass(frozen=True)
class Completion:
    """What the target wrote for one request: token ids as generated, never re-tokenised."""

    request: Request
    ids: tuple[int, ...]
    finish_reason: Literal["stop", "length"]


class Engine(Protocol):
    """Writes completions. Yields them in any order, each request exactly once."""

    name: str

    def generate(
        self, requests: Iterable[Request], on_tokens: Callable[[int], None]
    ) -> Iterator[Completion]:
        """Yield a completion a request; call ``on_tokens(n)`` as tokens appear."""
        ...


def choose_engine(name: EngineName, device: str) -> Literal["openvino", "transformers"]:
    """Resolve ``auto``: a GPU runs transformers, a CPU runs OpenVINO when it is installed.

    Args:
        name: what the recipe says.
        device: ``cpu`` or ``cuda``.

    Raises:
        FastDraftError: ``openvino`` is asked for and not installed.
    """
    has_openvino = openvino_available()
    if name == "openvino" and not has_openvino:
        raise FastDraftError(
            "generate.engine: openvino is not installed; `pip install fastdraft_hf[openvino]`"
        )
    if name != "auto":
        return name
    return "openvino" if has_openvino and device == "cpu" else "transformers"


def open_engine(
    name: Literal["openvino", "transformers"],
    *,
    target: Path,
    openvino_target: Path | None,
    stop_ids: set[int],
    batch_size: int,
    device: str,
) -> Engine:
    """Load the target into an engine.

    Args:
        name: which engine.
        target: the target's Hugging Face folder.
        openvino_target: its OpenVINO folder; needed by ``openvino`` only.
        stop_ids: token ids that end a text.
        batch_size: texts written at once.
        device: ``cpu`` or ``cuda``, for ``transformers``; OpenVINO runs on the CPU here.
    """
    if name == "openvino":
        from fastdraft_hf.data.engines.openvino import OpenVINOEngine

        if openvino_target is None:
            raise ValueError("the openvino engine needs openvino_target")
        return OpenVINOEngine(openvino_target, stop_ids, batch_size)
    from fastdraft_hf.data.engines.transformers import TransformersEngine

    return TransformersEngine(target, stop_ids, batch_size, device)
