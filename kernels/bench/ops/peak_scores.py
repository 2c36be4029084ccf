"""`peak_scores` against distances by differences."""

from __future__ import annotations

import torch
from torch import Tensor

from vlmprune.kernels.bench.case import Case, Contender, Plan
from vlmprune.kernels.peak_scores import peak_scores

NEIGHBOURS = 7


def plan(case: Case) -> Plan:
    features = torch.randn(case.batch * case.tokens, case.dim, dtype=case.dtype, device=case.device)
    offsets = range(0, len(features) + 1, case.tokens)
    near = min(NEIGHBOURS, case.tokens)
    return features.nbytes + 8 * case.batch * case.tokens**2, [
        Contender("ours", "", lambda: peak_scores(features, offsets, (near,) * case.batch)),
        Contender("torch", "cdist", lambda: [by_differences(each, near) for each in features.split(case.tokens)]),
    ]


def by_differences(features: Tensor, neighbours: int) -> Tensor:
    """One segment, as the official codes compute it."""
    values = features.float()
    squares = torch.cdist(values, values, compute_mode="donot_use_mm_for_euclid_dist") ** 2 / values.shape[1]
    density = (-squares.topk(neighbours, largest=False).values.mean(1)).exp()
    tie = torch.ones_like(squares, dtype=torch.bool).tril(-1)
    denser = (density[None] > density[:, None]) | ((density[None] == density[:, None]) & tie)
    apart = squares.masked_fill(~denser, squares.max()).amin(1)
    return apart.sqrt() * density


def check(device: str) -> bool:
    # Random numbers and not signs: distances that are nearly equal come in another order once their root is squared.
    features = torch.randn(64, 16)
    got = peak_scores(features.to(device), (0, 64), (5,)).cpu()
    return torch.allclose(got, by_differences(features, 5), rtol=1e-4, atol=1e-6)
