"""Assignment to targets and merging there; unmerging by the group map."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from vlmprune.kernels.merge_to_targets import merge_to_targets
from vlmprune.kernels.unmerge import unmerge

OFFSETS, TARGET_OFFSETS = [0, 0, 1, 31, 90], [0, 0, 1, 6, 17]


def oracle(
    values: Tensor, metric: Tensor, targets: Tensor, joins: Tensor | None, sizes: Tensor | None, plus: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """VisionZip's rule by hand, in float64."""
    values, unit = values.double(), torch.nn.functional.normalize(metric.double(), dim=1)
    weights = torch.ones(len(values)).double() if sizes is None else sizes.double()
    groups = torch.full((len(values),), -1)
    merged, total = torch.zeros(len(targets), values.shape[1]).double(), torch.zeros(len(targets)).double()
    for (begin, end), (first, last) in zip(pairwise(OFFSETS), pairwise(TARGET_OFFSETS), strict=True):
        own = (targets[first:last] + begin).tolist()
        for t in range(begin, end):
            if t in own:
                groups[t] = first + own.index(t)
            elif joins is None or joins[t]:
                groups[t] = first + int((unit[own] @ unit[t]).argmax())
        for i, t in enumerate(own):
            members = [m for m in range(begin, end) if groups[m] == first + i and (m != t or not plus)]
            size = weights[members].sum()
            mean = (weights[members, None] * values[members]).sum(0) / size if size else torch.zeros(values.shape[1])
            merged[first + i] = values[t] + mean if plus else mean
            total[first + i] = size + (weights[t] if plus else 0)
    return merged, total, groups


def some_targets() -> Tensor:
    lengths = [(OFFSETS[i + 1] - OFFSETS[i], TARGET_OFFSETS[i + 1] - TARGET_OFFSETS[i]) for i in range(4)]
    return torch.cat([torch.randperm(tokens)[:count] for tokens, count in lengths])


@pytest.mark.parametrize("implementation", ["torch", "triton"])
@pytest.mark.parametrize("combine", ["mean", "target_plus_mean"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("partly", [False, True])
def test_assignment_and_average(
    partly: bool, dtype: torch.dtype, combine: str, implementation: str, device: str
) -> None:
    values, metric, targets = torch.randn(90, 40).to(dtype)[:, ::2], torch.randn(90, 24), some_targets()
    joins = torch.rand(90) < 0.6 if partly else None
    sizes = torch.rand(90) + 0.5 if partly else None
    moved = [None if x is None else x.to(device) for x in (joins, sizes)]
    found = merge_to_targets(
        *(values.to(device), metric.to(device), OFFSETS, targets.to(device), TARGET_OFFSETS),
        joins=moved[0], sizes=moved[1], combine=combine, implementation=implementation,
    )  # fmt: skip
    merged, total, groups = oracle(values, metric, targets, joins, sizes, combine == "target_plus_mean")
    assert torch.equal(found.groups.cpu(), groups)
    assert found.values.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(found.values.cpu().double(), merged, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(found.sizes.cpu().double(), total, atol=1e-5, rtol=1e-5)


def test_a_target_keeps_its_own_group_and_twins_go_to_the_first(device: str) -> None:
    values = torch.tensor([[1.0, 0.0], [2.0, 0.0], [3.0, 0.0], [0.0, 1.0]], device=device)
    targets = torch.tensor([2, 0], device=device)
    found = merge_to_targets(values, values, [0, 4], targets, [0, 2])
    assert found.groups.tolist() == [1, 0, 0, 0]
    torch.testing.assert_close(found.values, torch.tensor([[5 / 3, 1 / 3], [1.0, 0.0]], device=device))
    assert found.sizes.tolist() == [3.0, 1.0]


@pytest.mark.parametrize("implementation", ["torch", "triton"])
def test_unmerge_restores_what_was_not_merged(implementation: str, device: str) -> None:
    values, metric, targets = torch.randn(90, 8, device=device), torch.randn(90, 8, device=device), some_targets()
    joins = torch.rand(90, device=device) < 0.1
    found = merge_to_targets(values, metric, OFFSETS, targets.to(device), TARGET_OFFSETS, joins=joins)
    back = unmerge(found.values[None], found.groups[None], implementation=implementation)[0]
    alone = found.groups >= 0
    alone &= found.sizes[found.groups] == 1
    assert bool(alone.any())
    assert torch.equal(back[alone], values[alone])
    assert not back[found.groups == -1].any()
    shared = (found.groups >= 0) & ~alone
    assert torch.equal(back[shared], found.values[found.groups[shared]])


BASE = {
    "values": torch.ones(4, 2), "metric": torch.ones(4, 3), "offsets": [0, 4], "targets": torch.tensor([1, 2]),
    "target_offsets": [0, 2],
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"values": torch.ones(4, 2, dtype=torch.int64)}, "floating point"),
        ({"metric": torch.ones(3, 2)}, r"metric must be \[4"),
        ({"targets": torch.tensor([1.0])}, "targets must be int64"),
        ({"targets": torch.tensor([1, 4])}, r"targets of segment 0 must lie in 0..3; got 1..4"),
        ({"targets": torch.tensor([1, 1])}, r"name a token twice: \[1, 1\]"),
        ({"targets": torch.tensor([], dtype=torch.int64), "target_offsets": [0, 0]}, "4 tokens and no target"),
        ({"target_offsets": [0, 1, 2]}, "same number of segments"),
        ({"joins": torch.ones(4)}, r"joins must be bool \[4\]"),
        ({"sizes": torch.ones(3)}, r"sizes must be \[4\]"),
        ({"combine": "sum"}, "'sum' is not one of mean, target_plus_mean"),
    ],
)
def test_bad_arguments(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        merge_to_targets(**{**BASE, **changes})


def test_bad_groups() -> None:
    with pytest.raises(ValueError, match="same batch"):
        unmerge(torch.zeros(2, 3, 4), torch.zeros(1, 3, dtype=torch.int64))
    with pytest.raises(IndexError, match=r"-1\.\.2"):
        unmerge(torch.zeros(1, 3, 4), torch.full((1, 2), 3))
