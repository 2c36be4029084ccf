"""`max_sum` against one product with the features per pick."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from vlmprune.kernels.bench.case import CHECK_COUNTS, CHECK_LENGTHS, CHECK_OFFSETS, Case, Contender, Plan, signs
from vlmprune.kernels.max_sum import max_sum


def plan(case: Case) -> Plan:
    features = case.random(case.batch * case.tokens, case.dim)
    images = features.view(case.batch, case.tokens, case.dim)
    offsets, k, seeds = case.offsets, [case.kept] * case.batch, [0] * case.batch
    moved = features.nbytes + 8 * case.batch * case.tokens**2 + 4 * case.batch * case.kept * case.tokens
    return moved, [
        Contender("ours", "", lambda: max_sum(features, offsets, k, seeds)),
        Contender(
            "torch", "one product with the features per pick", lambda: [_summed(x, case.kept) for x in images],
            case.batch * case.kept * case.tokens * case.dim / 8, 4 * features.numel(),
        ),
    ]  # fmt: skip


def _summed(features: Tensor, k: int) -> Tensor:
    unit = functional.normalize(features.float(), dim=-1)
    picks = torch.zeros(k, dtype=torch.int64, device=features.device)
    total = unit @ unit[0]
    total[0] = torch.inf
    for i in range(1, k):
        pick = total.argmin()
        picks[i] = pick
        total += unit @ unit[pick]
        total[pick] = torch.inf
    return picks


def check(device: str) -> bool:
    features = signs()
    expected: list[int] = []
    for part, count in zip(features.double().split(CHECK_LENGTHS), CHECK_COUNTS, strict=True):
        cosines = part @ part.T / 64
        picks = [0] if count else []
        while len(picks) < count:
            reach = cosines[picks].sum(0)
            reach[picks] = torch.inf
            picks.append(int(reach.argmin()))
        expected += picks
    return max_sum(features.half().to(device), CHECK_OFFSETS, CHECK_COUNTS, [0] * 4).tolist() == expected
