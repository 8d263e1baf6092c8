import pytest
import torch

from fastdraft_hf.decode import skinny
from fastdraft_hf.decode.skinny import MOST_ROWS, with_skinny_linears


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
    monkeypatch.setattr(skinny, "LEAST_ELEMENTS", 1)
    torch.manual_seed(rows)
    layer = torch.nn.Linear(32, 48, bias)
    for shape in ((rows, 32), (1, rows, 32), (rows, 1, 32)):
        inputs = torch.randn(shape)
        wanted, found = layer(inputs), with_skinny_linears(layer)(inputs)
        assert found.shape == wanted.shape
        assert found.is_contiguous()
        assert torch.allclose(found, wanted, atol=1e-4)


def test_the_choice_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(skinny, "_best", {})
    weights = [torch.randn(16, 8) for _ in range(3)]
    ways = {skinny._choose(torch.randn(2, 8), weights) for _ in range(5)}
    assert len(ways) == 1
    assert list(skinny._best) == [(16, 8, 2, torch.get_num_threads())]


def test_a_view_changes_no_module_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(skinny, "LEAST_ELEMENTS", 64)

    class Other(torch.nn.Linear):
        """An adapted or quantized layer."""

    small, other = torch.nn.Linear(4, 4), Other(32, 32)
    hooked, half = torch.nn.Linear(32, 32), torch.nn.Linear(32, 32).bfloat16()
    hooked.forward = lambda inputs: inputs
    plain = torch.nn.Linear(32, 32)
    model = torch.nn.ModuleList([small, other, hooked, half, plain, plain])
    before = [(type(m), dict(vars(m))) for m in model.modules()]
    view = with_skinny_linears(model)
    assert [(type(m), dict(vars(m))) for m in model.modules()] == before
    assert [m is not n for m, n in zip(view, model, strict=True)] == [True] * 6
    assert view[4] is view[5]  # a shared layer stays shared
    assert [type(m) for m in view][:4] == [torch.nn.Linear, Other, torch.nn.Linear, torch.nn.Linear]
    assert type(view[4]) is skinny._SkinnyLinear
    inputs = torch.randn(2, 32)
    assert view[2](inputs) is inputs
    assert torch.allclose(view[4](inputs), plain(inputs), atol=1e-5)
    assert view[4].weight is plain.weight


def test_long_inputs_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(skinny, "_choose", lambda *_: pytest.fail("timed a prompt"))
    monkeypatch.setattr(skinny, "LEAST_ELEMENTS", 1)
    layer = with_skinny_linears(torch.nn.Linear(4, 8))
    assert layer(torch.randn(MOST_ROWS + 1, 4)).shape == (9, 8)
    assert layer(torch.randn(0, 4)).shape == (0, 8)
