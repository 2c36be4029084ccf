"""`segmented_topk` against sorting and torch's top-k."""

from __future__ import annotations

import torch
from torch import Tensor

from vlmprune.kernels.bench.case import CHECK_COUNTS, CHECK_LENGTHS, CHECK_OFFSETS, Case, Contender, Plan
from vlmprune.kernels.segmented_topk import segmented_topk


def plan(case: Case) -> Plan:
    scores = torch.randn(case.batch, case.tokens, device=case.device)
    flat, offsets, k = scores.flatten(), case.offsets, [case.kept] * case.batch
    return 4 * flat.numel() + 8 * case.batch * case.kept, [
        Contender("ours", "", lambda: segmented_topk(flat, offsets, k)),
        Contender("torch", "stable sort per image", lambda: [_stable(row, case.kept) for row in scores]),
        Contender("library", "torch.topk (ties undefined), sort", lambda: scores.topk(case.kept).indices.sort()),
    ]


def _stable(scores: Tensor, k: int) -> Tensor:
    return scores.sort(stable=True, descending=True).indices[:k].sort().values


def check(device: str) -> bool:
    scores = torch.randn(CHECK_OFFSETS[-1]).mul(4).round()
    parts = zip(scores.split(CHECK_LENGTHS), CHECK_COUNTS, strict=True)
    expected = torch.cat([_stable(part, count) for part, count in parts])
    return torch.equal(segmented_topk(scores.to(device), CHECK_OFFSETS, CHECK_COUNTS).cpu(), expected)
