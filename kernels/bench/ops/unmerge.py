"""`unmerge` against gathering."""

from __future__ import annotations

import torch

from vlmprune.kernels.bench.case import Case, Contender, Plan
from vlmprune.kernels.unmerge import unmerge


def plan(case: Case) -> Plan:
    merged = case.random(case.batch, case.kept, case.dim)
    groups = torch.randint(0, case.kept, (case.batch, case.tokens), device=case.device)
    moved = merged.nbytes + merged.nbytes // case.kept * case.tokens
    return moved, [
        Contender("ours", "", lambda: unmerge(merged, groups)),
        Contender("torch", "gather", lambda: merged.gather(1, groups[..., None].expand(-1, -1, case.dim))),
    ]


def check(device: str) -> bool:
    merged, groups = torch.randn(2, 63, 33), torch.randint(-1, 63, (2, 577))
    expected = merged[torch.arange(2)[:, None], groups.clamp(min=0)].masked_fill((groups < 0)[..., None], 0.0)
    return torch.equal(unmerge(merged.to(device), groups.to(device)).cpu(), expected)
