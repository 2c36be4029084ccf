"""Density peaks of ragged segments against loops over tokens."""

import pytest
import torch

from vlmprune.kernels import peak_scores as module
from vlmprune.kernels.peak_scores import peak_scores
from vlmprune.kernels.shared import squared_distances as distances_module
from vlmprune.kernels.shared.squared_distances import segment_blocks, symmetric_squared_distances

OFFSETS = (0, 5, 5, 6, 25, 60)
NEIGHBOURS = (3, 0, 1, 7, 2)


def plain_scores(features: torch.Tensor, offsets: tuple[int, ...], neighbours: tuple[int, ...]) -> list[float]:
    """One token after the other, in fp64."""
    scores = []
    for begin, end, count in zip(offsets, offsets[1:], neighbours, strict=False):
        values = features[begin:end].double()
        apart = [[float((a - b).square().mean()) for b in values] for a in values]
        density = [float(torch.tensor(-sum(sorted(row)[:count]) / count).exp()) for row in apart]
        for i, row in enumerate(apart):
            denser = [row[j] for j in range(len(row)) if (density[j], -j) > (density[i], -i)]
            reach = min(denser) if denser else max(map(max, apart))
            scores.append(reach**0.5 * density[i])
    return scores


@pytest.mark.parametrize("implementation", ["torch", "triton"])
@pytest.mark.parametrize(("dtype", "dim"), [(torch.float32, 9), (torch.float32, 40), (torch.bfloat16, 17)])
def test_ragged_segments(implementation: str, dtype: torch.dtype, dim: int, device: str) -> None:
    features = torch.randn(60, dim).to(dtype)
    got = peak_scores(features.to(device), OFFSETS, NEIGHBOURS, implementation=implementation)
    torch.testing.assert_close(
        got.cpu(), torch.tensor(plain_scores(features, OFFSETS, NEIGHBOURS)), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("implementation", ["torch", "triton"])
def test_equal_tokens_and_strides(implementation: str, device: str) -> None:
    # Two and three alike, whose densities are equal: the first is the densest, the others lie 0 away from it.
    features = (torch.randint(0, 4, (24, 6)).float() * 100)[:, ::2]
    features[7:10], features[15] = features[6], features[2]
    offsets, neighbours = (0, 12, 24), (1, 2)
    got = peak_scores(features.to(device), offsets, neighbours, implementation=implementation)
    torch.testing.assert_close(
        got.cpu(), torch.tensor(plain_scores(features, offsets, neighbours)), rtol=1e-5, atol=1e-6
    )
    assert got[0] > 0
    assert got[7:10].tolist() == [0.0] * 3


@pytest.mark.parametrize("limit", [1, 400, 5000])
def test_blocks_of_segments_do_not_show(monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    features = torch.randn(60, 12)
    whole = peak_scores(features, OFFSETS, NEIGHBOURS)
    monkeypatch.setattr(module, "segment_blocks", lambda bounds, dim: segment_blocks(bounds, dim, limit))
    torch.testing.assert_close(peak_scores(features, OFFSETS, NEIGHBOURS), whole, rtol=1e-5, atol=1e-6)
    assert [segment for block in segment_blocks(OFFSETS, 12, limit) for segment in block] == list(range(5))


def test_distances_are_symmetric_and_exact_for_near_tokens() -> None:
    features = 1e3 * torch.randn(1, 40, 64)
    features[0, 1] = features[0, 0]
    features[0, 2] = features[0, 0] + 1e-2
    squares = symmetric_squared_distances(features)
    assert torch.equal(squares, squares.transpose(1, 2))
    assert squares[0, 0, 1] == 0
    exact = (features[0, 2].double() - features[0, 0].double()).square().sum()
    assert squares[0, 0, 2] == pytest.approx(float(exact), rel=1e-3)
    assert distances_module.BLOCK_ELEMENTS < 2**24


@pytest.mark.parametrize(
    ("features", "offsets", "neighbours", "message"),
    [
        (torch.zeros(4), (0, 4), (1,), "tokens, dim"),
        (torch.zeros(4, 2), (0, 3), (1,), "end with the number of rows 4"),
        (torch.zeros(4, 2), (0, 4), (5,), r"k\[0\] = 5"),
        (torch.zeros(4, 2), (0, 4), (0,), r"neighbours\[0\] = 0"),
    ],
)
def test_bad_arguments(features: torch.Tensor, offsets: object, neighbours: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        peak_scores(features, offsets, neighbours)  # type: ignore[arg-type]


def test_nothing() -> None:
    assert peak_scores(torch.zeros(0, 3), (0,), ()).shape == (0,)
    assert peak_scores(torch.zeros(0, 3), (0, 0), (0,)).shape == (0,)
