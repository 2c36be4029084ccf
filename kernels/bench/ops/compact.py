"""`compact` against gathering each plane."""

from __future__ import annotations

import torch
from torch import Tensor

from vlmprune.kernels.bench.case import Case, Contender, Plan
from vlmprune.kernels.compact import compact


def plan(case: Case) -> Plan:
    planes = [
        case.random(case.batch, case.tokens, case.dim),
        torch.ones(case.batch, case.tokens, dtype=torch.int64, device=case.device),
        torch.arange(3 * case.batch * case.tokens, device=case.device).view(3, case.batch, case.tokens),
        case.random(case.batch, case.tokens, case.dim),
    ]
    index = torch.rand(case.batch, case.tokens, device=case.device).argsort(1)[:, : case.kept].sort(1).values
    rows = torch.arange(case.batch, device=case.device)[:, None]

    def gather() -> list[Tensor]:
        wide = index[..., None].expand(-1, -1, case.dim)
        return [
            planes[0].gather(1, wide),
            planes[1].gather(1, index),
            planes[2].gather(2, index.expand(3, -1, -1)),
            planes[3].gather(1, wide),
        ]

    moved = 2 * sum(plane.nbytes for plane in planes) * case.kept // case.tokens
    return moved, [
        Contender("ours", "", lambda: compact(planes, index, dims=[0, 0, 1, 0])),
        Contender("torch", "gather per plane", gather),
        Contender(
            "library", "advanced indexing per plane",
            lambda: [planes[0][rows, index], planes[1][rows, index], planes[2][:, rows, index], planes[3][rows, index]],
        ),
    ]  # fmt: skip


def check(device: str) -> bool:
    plane, index = torch.randn(2, 577, 33), torch.randint(-1, 577, (2, 63))
    expected = plane[torch.arange(2)[:, None], index.clamp(min=0)].masked_fill((index < 0)[..., None], 0.0)
    return torch.equal(compact([plane.to(device)], index.to(device))[0].cpu(), expected)
