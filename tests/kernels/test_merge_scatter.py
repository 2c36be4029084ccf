"""Size-weighted merging."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vlmprune.kernels.merge_scatter import merge_scatter


def oracle(source: Tensor, destination: Tensor, sizes: Tensor | None, outputs: int) -> tuple[Tensor, Tensor]:
    merged, total = (
        torch.zeros(outputs, source.shape[1], dtype=torch.float64),
        torch.zeros(outputs, dtype=torch.float64),
    )
    for t, row in enumerate(destination.tolist()):
        if row >= 0:
            size = 1.0 if sizes is None else float(sizes[t])
            merged[row] += size * source[t].double()
            total[row] += size
    return merged / total.where(total != 0, 1.0)[:, None], total


@pytest.mark.parametrize("implementation", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("weighted", ["none", "float", "int"])
def test_weighted_averages(weighted: str, dtype: torch.dtype, implementation: str, device: str) -> None:
    source = torch.randn(90, 80).to(dtype)[:, ::2]
    # Row 3 gets nothing, row 4 eleven tokens or more, and about one token in eight is dropped.
    destination = torch.randint(-1, 7, (90,)).masked_fill_(torch.arange(90) < 11, 4)
    destination[destination == 3] = -1
    source[destination == -1] = torch.nan
    sizes = {"none": None, "float": torch.rand(180)[::2] * 3, "int": torch.randint(0, 3, (90,))}[weighted]
    merged, total = merge_scatter(
        source.to(device),
        destination.to(device),
        None if sizes is None else sizes.to(device),
        7,
        implementation=implementation,
    )
    expected, expected_total = oracle(source, destination, sizes, 7)
    assert merged.dtype == dtype
    assert total.dtype == torch.float32
    assert total[3] == 0
    assert not merged[3].any()
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
    torch.testing.assert_close(merged.cpu().double(), expected, atol=tolerance / 10, rtol=tolerance)
    torch.testing.assert_close(total.cpu().double(), expected_total, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("implementation", ["torch", "triton"])
def test_two_runs_agree_to_the_bit(implementation: str, device: str) -> None:
    source, destination = torch.randn(200, 16, device=device), torch.randint(0, 3, (200,), device=device)
    sizes = torch.rand(200, device=device)
    first = merge_scatter(source, destination, sizes, 3, implementation=implementation)
    again = merge_scatter(source, destination, sizes, 3, implementation=implementation)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("implementation", ["torch", "triton"])
def test_a_permutation_moves_rows(implementation: str, device: str) -> None:
    source = torch.randn(63, 7, device=device)
    order = torch.randperm(63, device=device)
    merged, total = merge_scatter(source, order, None, 63, implementation=implementation)
    assert torch.equal(merged[order], source)
    assert bool((total == 1).all())


@pytest.mark.parametrize("implementation", ["torch", "triton"])
@pytest.mark.parametrize(("tokens", "dim", "outputs"), [(0, 4, 3), (5, 0, 2), (5, 4, 0), (1, 1, 1)])
def test_empty_and_tiny(tokens: int, dim: int, outputs: int, implementation: str, device: str) -> None:
    source = torch.ones(tokens, dim, device=device)
    destination = torch.full((tokens,), outputs - 1, device=device)
    merged, total = merge_scatter(source, destination, None, outputs, implementation=implementation)
    assert merged.shape == (outputs, dim)
    assert float(total.sum()) == (tokens if outputs else 0)
    assert not merged.isnan().any()


@pytest.mark.parametrize("tokens", [577, 2880, 10000])
def test_reference(tokens: int) -> None:
    source, destination = torch.randn(tokens, 4), torch.randint(-1, tokens // 4, (tokens,))
    sizes = torch.randint(1, 5, (tokens,))
    merged, total = merge_scatter(source, destination, sizes, tokens // 4)
    expected, expected_total = oracle(source, destination, sizes, tokens // 4)
    torch.testing.assert_close(merged.double(), expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(total.double(), expected_total)


@pytest.mark.usefixtures("large_shapes")
@pytest.mark.parametrize("outputs", [1, 640, 10000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernel_on_many_tokens(dtype: torch.dtype, outputs: int, device: str) -> None:
    source = torch.randn(10000, 1000).to(dtype).to(device)
    destination, sizes = torch.randint(-1, outputs, (10000,), device=device), torch.rand(10000, device=device)
    found = merge_scatter(source, destination, sizes, outputs, implementation="triton")
    expected = merge_scatter(source, destination, sizes, outputs, implementation="torch")
    torch.testing.assert_close(found[0], expected[0], atol=1e-4, rtol=1e-2 if dtype == torch.bfloat16 else 1e-4)
    torch.testing.assert_close(found[1], expected[1], atol=1e-4, rtol=1e-4)


@given(data=st.data(), tokens=st.integers(0, 20), outputs=st.integers(1, 6))
@settings(max_examples=30, deadline=None)
def test_reference_on_any_shape(data: st.DataObject, tokens: int, outputs: int) -> None:
    source = torch.randn(tokens, 3)
    rows = data.draw(st.lists(st.integers(-1, outputs - 1), min_size=tokens, max_size=tokens))
    destination = torch.tensor(rows, dtype=torch.int64)
    merged, total = merge_scatter(source, destination, None, outputs)
    expected, expected_total = oracle(source, destination, None, outputs)
    torch.testing.assert_close(merged.double(), expected, atol=1e-5, rtol=1e-4)
    assert torch.equal(total.double(), expected_total)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.ones(4, 2, dtype=torch.int64), torch.zeros(4, dtype=torch.int64), None, 1), "floating point"),
        ((torch.ones(4, 2), torch.zeros(3, dtype=torch.int64), None, 1), r"int64 \[4\]"),
        ((torch.ones(4, 2), torch.zeros(4), None, 1), r"int64 \[4\]"),
        ((torch.ones(4, 2), torch.zeros(4, dtype=torch.int64), torch.ones(3), 1), r"sizes must be \[4\]"),
        ((torch.ones(4, 2), torch.zeros(4, dtype=torch.int64), None, -1), "negative"),
        ((torch.ones(4, 2), torch.full((4,), 1), None, 1), r"-1\.\.0; got 1\.\.1"),
        ((torch.ones(4, 2), torch.full((4,), -2), None, 1), r"-1\.\.0; got -2\.\.-2"),
    ],
)
def test_bad_arguments(arguments: tuple[Tensor, Tensor, Tensor | None, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        merge_scatter(*arguments)
