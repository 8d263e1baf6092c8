import copy
import io
from typing import Any

import pytest
import torch

from fastdraft_hf.train.optimizer import MuonWithAdamW, RowAdam, orthogonalized


def make_model(seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    return torch.nn.Sequential(
        torch.nn.Linear(6, 10), torch.nn.LayerNorm(10), torch.nn.Linear(10, 4)
    )


def make_optimizer(model: torch.nn.Module, **changes: float) -> MuonWithAdamW:
    parameters = list(model.parameters())
    return MuonWithAdamW(
        [p for p in parameters if p.ndim == 2],
        [p for p in parameters if p.ndim != 2],
        [],
        **{"muon_lr": 0.02, "lr": 0.01, "weight_decay": 0.1, **changes},
    )


def step(model: torch.nn.Module, optimizers: list[torch.optim.Optimizer], number: int) -> None:
    inputs = torch.randn(5, 6, generator=torch.Generator().manual_seed(number))
    for optimizer in optimizers:
        optimizer.zero_grad()
    model(inputs).square().sum().backward()
    for optimizer in optimizers:
        optimizer.step()


def weights(model: torch.nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_it_steps_as_the_two_alone() -> None:
    model, other = make_model(), make_model()
    together = make_optimizer(model)
    muon = torch.optim.Muon(
        [p for p in other.parameters() if p.ndim == 2],
        lr=0.02,
        weight_decay=0.1,
        adjust_lr_fn="match_rms_adamw",
    )
    adamw = torch.optim.AdamW(
        [p for p in other.parameters() if p.ndim != 2],
        lr=0.01,
        betas=(0.9, 0.95),
        eps=1e-8,
        weight_decay=0.0,
        fused=True,
    )
    start = weights(model)
    for number in range(5):
        step(model, [together], number)
        step(other, [muon, adamw], number)
    assert not any(torch.equal(a, b) for a, b in zip(start, weights(model), strict=True))
    for before, ours, theirs in zip(start, weights(model), weights(other), strict=True):
        # PyTorch iterates in bfloat16.
        assert (ours - theirs).norm() < 0.02 * (ours - before).norm()


def test_its_state_resumes_identically() -> None:
    model = make_model()
    optimizer = make_optimizer(model)
    for number in range(3):
        step(model, [optimizer], number)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    twin = copy.deepcopy(model)
    resumed = make_optimizer(twin, muon_lr=9.0, lr=9.0)  # the state's rates win
    resumed.load_state_dict(torch.load(file))
    fresh_twin = copy.deepcopy(model)
    fresh = make_optimizer(fresh_twin)
    for number in range(3, 6):
        step(model, [optimizer], number)
        step(twin, [resumed], number)
        step(fresh_twin, [fresh], number)
    assert equal(weights(model), weights(twin))
    assert not equal(weights(model), weights(fresh_twin))  # the state does matter


def test_a_table_moves_in_the_rows_that_were_read() -> None:
    """Dense and sparse gradients do the same; if all rows are read, it is Adam."""
    start = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    settings = {"lr": 0.1, "betas": (0.9, 0.95)}

    def moved(make: type[torch.optim.Optimizer], reads: list[list[int]], sparse: bool) -> Any:
        table = torch.nn.Parameter(start.clone())
        optimizer = make([{"params": [table]}], **settings)
        for ids in reads:
            optimizer.zero_grad()
            # Two gradients that add up, as of a tied head.
            rows, first = (
                torch.nn.functional.embedding(torch.tensor(some), table, sparse=sparse)
                for some in (ids, ids[:1])
            )
            (rows.square().sum() + 2 * first.sum()).backward()
            optimizer.step()
        return table.detach()

    reads = [[1, 5, 5], [2], [5, 0]]
    found = moved(RowAdam, reads, sparse=True)
    torch.testing.assert_close(moved(RowAdam, reads, sparse=False), found)
    assert torch.equal(found[[3, 4, 6, 7]], start[[3, 4, 6, 7]])
    assert not (found[[0, 1, 2, 5]] == start[[0, 1, 2, 5]]).any()
    everything = [list(range(8))] * 4
    adam = moved(torch.optim.Adam, everything, sparse=False)
    torch.testing.assert_close(moved(RowAdam, everything, sparse=True), adam)


@pytest.mark.parametrize("shape", [(12, 70), (40, 16), (16, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_matrices_are_orthogonalized_as_by_plain_iterations(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    wide = matrix / matrix.norm()
    for _ in range(5):
        gram = wide @ wide.T
        wide = 3.4445 * wide + (-4.7750 * gram + 2.0315 * gram @ gram) @ wide
    found = orthogonalized(matrix)
    assert found.dtype == dtype
    torch.testing.assert_close(found, wide, rtol=1e-3, atol=1e-4)
