"""Gathering kept tokens of several tensors."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vlmprune.kernels.compact import compact


def oracle(plane: Tensor, index: Tensor, fill: float, dim: int) -> Tensor:
    first = plane.movedim((dim, dim + 1), (0, 1))
    out = first.new_full((*index.shape, *first.shape[2:]), fill)
    for b, row in enumerate(index.tolist()):
        for m, token in enumerate(row):
            if token >= 0:
                out[b, m] = first[b, token]
    return out.movedim((0, 1), (dim, dim + 1))


def ragged_index(batch: int, length: int, kept: int) -> Tensor:
    """Ascending tokens, and padding on the right."""
    index = torch.full((batch, kept), -1)
    for b in range(batch):
        count = int(torch.randint(0, min(kept, length) + 1, (1,))) if b else min(kept, length)
        index[b, :count] = torch.randperm(length)[:count].sort().values
    return index


@pytest.mark.parametrize("implementation", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_planes_of_one_prefill(dtype: torch.dtype, implementation: str, device: str) -> None:
    planes = [
        torch.randn(2, 30, 600).to(dtype),
        torch.rand(2, 30) > 0.5,
        torch.randint(0, 2**40, (3, 2, 30)),
        torch.randn(2, 30, 6, 4).to(dtype)[..., 1::2],
        torch.randn(30, 7, 2).permute(2, 0, 1),
        torch.randn(2, 30, 3, 5, dtype=torch.float64),
    ]
    planes[0][0, 3, 5], planes[0][1, 4, 6] = math.nan, math.inf
    dims, fills = [0, 0, 1, 0, 0, 0], [math.nan, True, -7, 1.5, 0, 2]
    index = ragged_index(2, 30, 19)
    moved = [plane.to(device) for plane in planes]
    found = compact(moved, index.to(device), fills=fills, dims=dims, implementation=implementation)
    for plane, result, fill, dim in zip(planes, found, fills, dims, strict=True):
        assert result.dtype == plane.dtype
        assert result.is_contiguous()
        torch.testing.assert_close(result.cpu(), oracle(plane, index, fill, dim), atol=0, rtol=0, equal_nan=True)


@pytest.mark.parametrize("implementation", ["torch", "triton"])
def test_one_launch_whatever_the_planes(implementation: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from vlmprune.kernels import compact as module

    launches: list[object] = []
    kernel = module._compact_kernel

    class Counted:
        def __getitem__(self, grid: object) -> object:
            launches.append(grid)
            return kernel[grid]

    monkeypatch.setattr(module, "_compact_kernel", Counted())
    planes = [torch.randn(1, 5, 8, device=device), torch.zeros(1, 5, dtype=torch.bool, device=device)]
    compact(planes, torch.tensor([[1, 4]], device=device), implementation=implementation)
    assert len(launches) == (1 if implementation == "triton" else 0)


@pytest.mark.parametrize("implementation", ["torch", "triton"])
@pytest.mark.parametrize("shape", [(0, 4, 3), (2, 4, 0), (2, 0, 3), (1, 1, 1)])
def test_empty_and_tiny(shape: tuple[int, int, int], implementation: str, device: str) -> None:
    plane = torch.randn(shape, device=device)
    index = torch.full((shape[0], 2), 0 if shape[1] else -1, device=device)
    (found,) = compact([plane], index, fills=[5.0], implementation=implementation)
    assert torch.equal(found.cpu(), oracle(plane.cpu(), index.cpu(), 5.0, 0))
    (found,) = compact([plane], index[:, :0], implementation=implementation)
    assert found.shape == (shape[0], 0, shape[2])
    assert compact([], index) == []


@pytest.mark.parametrize("length", [7, 63, 577, 2880, 10000])
def test_reference(length: int) -> None:
    plane = torch.randn(2, length, 5)
    index = ragged_index(2, length, length)
    assert torch.equal(compact([plane], index)[0], oracle(plane, index, 0.0, 0))
    assert torch.equal(compact([plane], index[:, :1])[0], oracle(plane, index[:, :1], 0.0, 0))


@pytest.mark.usefixtures("large_shapes")
@pytest.mark.parametrize("length", [577, 2880, 10000])
def test_kernel_on_long_sequences(length: int, device: str) -> None:
    planes = [
        torch.randn(3, length, 3584, device=device).bfloat16(),
        torch.arange(3 * length, device=device).view(3, -1),
    ]
    index = ragged_index(3, length, length // 2).to(device)
    expected = compact(planes, index, implementation="torch")
    for found, reference in zip(compact(planes, index, implementation="triton"), expected, strict=True):
        assert torch.equal(found, reference)


@given(batch=st.integers(1, 4), length=st.integers(1, 12), kept=st.integers(0, 12), width=st.integers(1, 4))
@settings(max_examples=30, deadline=None)
def test_reference_on_any_shape(batch: int, length: int, kept: int, width: int) -> None:
    plane = torch.randn(batch, length, width)
    index = ragged_index(batch, length, kept)
    assert torch.equal(compact([plane], index, fills=[-3.0])[0], oracle(plane, index, -3.0, 0))


def test_bad_arguments() -> None:
    plane, index = torch.zeros(2, 4, 3), torch.zeros(2, 2, dtype=torch.int64)
    with pytest.raises(ValueError, match="int64"):
        compact([plane], index.int())
    with pytest.raises(ValueError, match="one entry per plane"):
        compact([plane], index, fills=[0, 0])
    with pytest.raises(ValueError, match=r"planes\[0\] must have the batch"):
        compact([plane[:1]], index)
    with pytest.raises(ValueError, match=r"planes\[0\] must have the batch"):
        compact([plane], index, dims=[1])
    with pytest.raises(ValueError, match="complex"):
        compact([plane.to(torch.complex64)], index)
    with pytest.raises(IndexError, match=r"-1\.\.3; got 0\.\.4"):
        compact([plane], torch.tensor([[0, 4], [0, 0]]))
