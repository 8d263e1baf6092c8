from __future__ import annotations

import pytest
import torch

from fastdraft_hf.decode import skinny
from fastdraft_hf.decode.skinny import MOST_ROWS, skinny_linear, skinny_linears


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 8, 9])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("way", ["_product", "_doubled", "linear"])
def test_every_way_is_the_same_product(
    monkeypatch: pytest.MonkeyPatch, rows: int, bias: bool, way: str
) -> None:
    if way == "_doubled" and rows > 1:
        pytest.skip("that is for a single row")
    chosen = getattr(skinny, way)
    monkeypatch.setattr(skinny, "_choose", lambda *_: chosen)
    torch.manual_seed(rows)
    weight, added = torch.randn(48, 32), torch.randn(48) if bias else None
    for shape in ((rows, 32), (1, rows, 32), (rows, 1, 32)):
        inputs = torch.randn(shape)
        wanted = torch.nn.functional.linear(inputs, weight, added)
        found = skinny_linear(weight, added, [weight], inputs)
        assert found.shape == wanted.shape
        assert found.is_contiguous()
        assert torch.allclose(found, wanted, atol=1e-4)


def test_the_choice_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(skinny, "_best", {})
    weights = [torch.randn(16, 8) for _ in range(3)]
    ways = {skinny._choose(torch.randn(2, 8), weights) for _ in range(5)}
    assert len(ways) == 1
    assert list(skinny._best) == [(16, 8, 2, torch.get_num_threads())]


def test_layers_are_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(skinny, "LEAST_ELEMENTS", 64)

    class Other(torch.nn.Linear):
        """An adapted or quantised layer."""

    small, other = torch.nn.Linear(4, 4), Other(32, 32)
    hooked, half = torch.nn.Linear(32, 32), torch.nn.Linear(32, 32).bfloat16()
    theirs = hooked.forward = lambda inputs: inputs
    plain = torch.nn.Linear(32, 32)
    model = torch.nn.ModuleList([small, other, hooked, half, plain])
    inputs = torch.randn(2, 32)
    wanted = plain(inputs)

    def fail() -> None:
        with skinny_linears(model):
            changed = [m for m in model if "forward" in vars(m)]
            assert changed == [hooked, plain]
            assert torch.allclose(plain(inputs), wanted, atol=1e-5)
            with skinny_linears(model):
                assert "forward" in vars(plain)
            assert "forward" in vars(plain)
            raise KeyError("inside")

    with pytest.raises(KeyError, match="inside"):
        fail()
    assert [m for m in model if "forward" in vars(m)] == [hooked]
    assert hooked.forward is theirs


def test_long_inputs_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(skinny, "_choose", lambda *_: pytest.fail("timed a prompt"))
    weight = torch.randn(8, 4)
    assert skinny_linear(weight, None, [weight], torch.randn(MOST_ROWS + 1, 4)).shape == (9, 8)
    assert skinny_linear(weight, None, [weight], torch.randn(0, 4)).shape == (0, 8)
