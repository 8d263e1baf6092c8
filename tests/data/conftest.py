import pytest

from fastdraft_hf.data.installed import function_heads


@pytest.fixture(scope="session")
def heads() -> list[str]:
    """Every function head of the standard library; parsing it takes seconds, so only once."""
    return list(function_heads())
