from __future__ import annotations

import pytest
from planning import QUICKSTART

from fastdraft_hf.recipe import Recipe, read_recipe


@pytest.fixture(scope="module")
def quickstart() -> Recipe:
    return read_recipe(QUICKSTART, ["device=cpu"])
