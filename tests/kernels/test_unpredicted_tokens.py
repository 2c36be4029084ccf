"""Tokens that their neighbours do not predict, against the scan token by token."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from vlmprune.kernels.unpredicted_tokens import METRICS, SCANS, unpredicted_tokens

GRIDS = [(5, 7), (1, 1), (9, 3), (1, 6), (6, 1)]


def images(dim: int = 20, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Slow steps of a few levels, so that every rule is met."""
    tokens = sum(rows * columns for rows, columns in GRIDS)
    levels = torch.randint(0, 3, (tokens, 1)) * 0.25 + torch.randint(0, 2, (tokens, dim)) * 0.0625
    return levels.to(dtype)


def distance(first: np.ndarray, second: np.ndarray, metric: str) -> float:
    gap = np.abs(first.astype(np.float64) - second)
    return {"max": gap.max(), "mae": gap.mean(), "rmse": np.sqrt((gap**2).mean())}[metric]


def one_by_one(
    image: np.ndarray, rows: int, columns: int, tau: float, metric: str, scan: str, anchored: bool
) -> list[bool]:
    def alike(first: np.ndarray, second: np.ndarray) -> bool:
        return distance(first, second, metric) <= tau

    kept = np.ones((rows, columns), dtype=bool)
    pixels = image.reshape(rows, columns, -1)
    if scan != "pred_2d":
        last = None
        for row in range(rows):
            for column in reversed(range(columns)) if scan == "serpentine" and row % 2 else range(columns):
                kept[row, column] = last is None or not alike(pixels[row, column], last)
                last = pixels[row, column] if kept[row, column] else last
        return kept.flatten().tolist()
    seen = pixels.copy()
    for row in range(rows):
        for column in range(columns):
            if row == column == 0:
                continue
            if row == 0:
                prediction = seen[0, column - 1]
            elif column == 0:
                prediction = seen[row - 1, 0]
            else:
                left, above, corner = seen[row, column - 1], seen[row - 1, column], seen[row - 1, column - 1]
                prediction = above if alike(corner, left) and not alike(corner, above) else left
            kept[row, column] = not alike(pixels[row, column], prediction)
            if anchored and not kept[row, column]:
                seen[row, column] = prediction
    return kept.flatten().tolist()


@pytest.mark.parametrize("implementation", ["torch", "triton"])
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(
    ("scan", "anchored"), [("pred_2d", True), ("pred_2d", False), ("raster", True), ("serpentine", True)]
)
def test_as_one_by_one(scan: str, anchored: bool, metric: str, implementation: str, device: str) -> None:
    for tau in {"max": (0.0, 0.0625), "mae": (0.03,), "rmse": (0.045,)}[metric]:
        values = images()
        kept = unpredicted_tokens(
            values.to(device),
            GRIDS,
            tau=tau,
            metric=metric,
            scan=scan,
            anchored=anchored,
            implementation=implementation,
        )
        bounds = np.cumsum([0, *(rows * columns for rows, columns in GRIDS)])
        expected = [
            token
            for (begin, end), grid in zip(pairwise(bounds), GRIDS, strict=True)
            for token in one_by_one(values[begin:end].numpy(), *grid, tau, metric, scan, anchored)
        ]
        assert kept.tolist() == expected
        assert 0 < sum(expected) <= len(expected)
    assert sum(expected) < len(expected)


def test_small_differences_add_up_unless_anchored() -> None:
    values = torch.arange(10.0)[:, None].expand(-1, 4)
    assert unpredicted_tokens(values, [(1, 10)], tau=1.5).tolist() == [True, False] * 5
    assert unpredicted_tokens(values, [(1, 10)], tau=1.5, anchored=False).sum() == 1


@pytest.mark.parametrize("implementation", ["torch", "triton"])
@pytest.mark.parametrize("scan", SCANS)
def test_nan_is_like_nothing(scan: str, implementation: str, device: str) -> None:
    values = torch.zeros(12, 5)
    values[5, 2] = torch.nan
    kept = unpredicted_tokens(values.to(device), [(3, 4)], tau=0.5, scan=scan, implementation=implementation)
    # Its neighbours are compared with it.
    assert kept[[0, 5]].all()
    assert not kept[[1, 2, 3]].any()


@pytest.mark.parametrize("implementation", ["torch", "triton"])
def test_strides_half_precision_and_nothing(implementation: str, device: str) -> None:
    values = images(dtype=torch.bfloat16)
    wide = torch.empty(2 * len(values), values.shape[1] + 3, dtype=values.dtype)
    wide[::2, 3:] = values
    kept = unpredicted_tokens(wide.to(device)[::2, 3:], GRIDS, tau=0.1, implementation=implementation)
    assert torch.equal(kept.cpu(), unpredicted_tokens(values, GRIDS, tau=0.1))
    assert unpredicted_tokens(torch.zeros(0, 4, device=device), [], implementation=implementation).shape == (0,)


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((4, 3), {"metric": "l2"}, "metric='l2'"),
        ((4, 3), {"scan": "zigzag"}, "scan='zigzag'"),
        ((4,), {}, "floating point"),
        ((5, 3), {}, "have 4 tokens, values have 5"),
    ],
)
def test_bad_arguments(shape: tuple[int, ...], options: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        unpredicted_tokens(torch.zeros(shape), [(2, 2)], **options)
    with pytest.raises(ValueError, match="1 row"):
        unpredicted_tokens(torch.zeros(0, 3), [(0, 2)])
