"""The nearest centre of every token against a loop."""

import pytest
import torch

from vlmprune.kernels.nearest_centre import nearest_centre

OFFSETS, ENDS = (0, 7, 7, 40, 60), (0, 2, 2, 22, 23)


def centres() -> torch.Tensor:
    parts = [torch.randperm(7)[:2], torch.randperm(33)[:20], torch.tensor([4])]
    return torch.cat(parts)


@pytest.mark.parametrize("implementation", ["torch", "triton"])
@pytest.mark.parametrize(("dtype", "dim"), [(torch.float32, 9), (torch.bfloat16, 40)])
def test_ragged_segments(implementation: str, dtype: torch.dtype, dim: int, device: str) -> None:
    features, chosen = torch.randn(60, dim).to(dtype), centres()
    # Equally near centres, and tokens equal to a centre that comes after another equal one.
    features[chosen[3] + 7] = features[chosen[2] + 7]
    features[20] = features[chosen[2] + 7]
    got = nearest_centre(features.to(device), OFFSETS, chosen.to(device), ENDS, implementation=implementation)
    for begin, end, first, last in zip(OFFSETS, OFFSETS[1:], ENDS, ENDS[1:], strict=False):
        own = {begin + int(chosen[place]): place for place in range(first, last)}
        for token in range(begin, end):
            apart = [
                float((features[token].double() - features[begin + chosen[place]].double()).square().sum())
                for place in range(first, last)
            ]
            assert int(got[token]) == own.get(token, first + min(range(len(apart)), key=apart.__getitem__))


def test_no_centres() -> None:
    assert nearest_centre(torch.zeros(3, 2), (0, 3), torch.zeros(0, dtype=torch.int64), (0, 0)).tolist() == [-1] * 3


@pytest.mark.parametrize(
    ("features", "centres", "ends", "message"),
    [
        (torch.zeros(4), torch.zeros(1, dtype=torch.int64), (0, 1), "tokens, dim"),
        (torch.zeros(4, 2), torch.zeros(1), (0, 1), "centres must be int64"),
        (torch.zeros(4, 2), torch.zeros(1, dtype=torch.int64), (0, 0, 1), "same number of segments"),
    ],
)
def test_bad_arguments(features: torch.Tensor, centres: torch.Tensor, ends: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        nearest_centre(features, (0, 4), centres, ends)
