"""`nearest_centre` against all distances by differences."""

from __future__ import annotations

import torch
from torch import Tensor

from vlmprune.kernels.bench.case import Case, Contender, Plan, signs
from vlmprune.kernels.nearest_centre import nearest_centre


def plan(case: Case) -> Plan:
    features = torch.randn(case.batch * case.tokens, case.dim, dtype=case.dtype, device=case.device)
    offsets = range(0, len(features) + 1, case.tokens)
    ends = range(0, case.batch * case.kept + 1, case.kept)
    centres = torch.arange(case.kept, device=case.device).repeat(case.batch)
    return features.nbytes, [
        Contender("ours", "", lambda: nearest_centre(features, offsets, centres, ends)),
        Contender("torch", "cdist", lambda: [by_differences(each, case.kept) for each in features.split(case.tokens)]),
    ]


def by_differences(features: Tensor, count: int) -> Tensor:
    """One segment whose first `count` tokens are the centres."""
    values = features.float()
    return torch.cdist(values, values[:count], compute_mode="donot_use_mm_for_euclid_dist").argmin(1)


def check(device: str) -> bool:
    features = signs()[:64]
    got = nearest_centre(features.to(device), (0, 64), torch.arange(9, device=device), (0, 9)).cpu()
    apart = torch.cdist(features, features[:9], compute_mode="donot_use_mm_for_euclid_dist")
    return torch.equal(apart.gather(1, got[:, None])[:, 0], apart.amin(1))
