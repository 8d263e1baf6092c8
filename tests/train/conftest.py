"""One start of two processes, for all tests that compare one process with two."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from launched import TwoProcesses, launch


@pytest.fixture(scope="session")
def two_processes(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[..., Any], tiny_tokenizer: Any
) -> TwoProcesses:
    """Train in two processes, once in the session: starting them takes longer than training."""
    return launch(tmp_path_factory.mktemp("two_processes"), tiny_model, tiny_tokenizer)
