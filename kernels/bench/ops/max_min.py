"""`max_min` against the running minimum over a distance matrix and DivPrune's published loop."""

from __future__ import annotations

import torch
from torch import Tensor

from vlmprune.kernels.bench.case import CHECK_COUNTS, CHECK_LENGTHS, CHECK_OFFSETS, Case, Contender, Plan, signs
from vlmprune.kernels.max_min import max_min


def plan(case: Case) -> Plan:
    features = case.random(case.batch * case.tokens, case.dim)
    images = features.view(case.batch, case.tokens, case.dim)
    offsets, k = case.offsets, [case.kept] * case.batch
    matrix = case.batch * case.tokens**2
    moved = features.nbytes + 8 * matrix + 4 * case.batch * case.kept * case.tokens
    return moved, [
        Contender("ours", "", lambda: max_min(features, offsets, k)),
        Contender(
            "torch", "matrix and running minimum", lambda: [running_minimum(distances_of(x.float()), case.kept) for x in images],
            matrix + 4 * case.batch * case.kept * case.tokens, 12 * case.tokens**2,
        ),
        Contender(
            "official", "minimum over all chosen rows at every step", lambda: [all_rows(x, case.kept) for x in images],
            matrix + case.batch * case.tokens * case.kept**2 / 2, 12 * case.tokens**2,
        ),
    ]  # fmt: skip


def plan_weighted(case: Case) -> Plan:
    """The choice of ZOO-Prune, which has no published code."""
    features, weights = (
        case.random(case.batch * case.tokens, case.dim),
        torch.rand(case.batch * case.tokens).to(case.device),
    )
    images = list(zip(features.split(case.tokens), weights.split(case.tokens), strict=True))
    offsets, k = case.offsets, [case.kept] * case.batch
    matrix = case.batch * case.tokens**2

    def straightforward() -> list[Tensor]:
        return [weighted_minimum(distances_of(x.float()), weight, case.kept) for x, weight in images]

    return features.nbytes + 8 * matrix + 4 * case.batch * case.kept * case.tokens, [
        Contender("ours", "with weights", lambda: max_min(features, offsets, k, weights=weights)),
        Contender(
            "torch", "with weights: matrix and running minimum", straightforward,
            matrix + 4 * case.batch * case.kept * case.tokens, 12 * case.tokens**2,
        ),
    ]  # fmt: skip


PLANS = (plan, plan_weighted)


def distances_of(features: Tensor) -> Tensor:
    unit = features / features.norm(dim=-1, keepdim=True)
    return 1.0 - unit @ unit.T


def running_minimum(distances: Tensor, k: int) -> Tensor:
    """DivPrune's picks from a distance matrix; each keeps the distance to the nearest chosen token."""
    picks = torch.empty(k, dtype=torch.int64, device=distances.device)
    picks[0] = distances.topk(2, dim=0, largest=False).values[1].argmax()
    nearest = distances[picks[0]]
    for i in range(1, k):
        picks[i] = nearest.argmax()
        nearest = torch.minimum(nearest, distances[picks[i]])
    return picks


def weighted_minimum(distances: Tensor, weights: Tensor, k: int) -> Tensor:
    """ZOO-Prune's picks from a distance matrix: the highest weight times distance to the nearest chosen token."""
    picks = torch.empty(k, dtype=torch.int64, device=distances.device)
    picks[0] = weights.argmax()
    nearest = distances[picks[0]].clone()
    for i in range(1, k):
        nearest[picks[i - 1]] = -torch.inf
        picks[i] = (nearest * weights).argmax()
        nearest = torch.minimum(nearest, distances[picks[i]])
    return picks


def all_rows(features: Tensor, k: int) -> Tensor:
    distances = distances_of(features)
    picks = torch.empty(k, dtype=torch.int64, device=features.device)
    picks[0] = distances.topk(2, dim=0, largest=False).values[1].argmax()
    for i in range(1, k):
        chosen = distances.index_select(0, picks.gather(0, torch.arange(i, device=features.device)))
        picks[i] = chosen.amin(0).argmax()
    return picks


def check(device: str) -> bool:
    features = signs()
    expected: list[int] = []
    for part, count in zip(features.double().split(CHECK_LENGTHS), CHECK_COUNTS, strict=True):
        cosines = part @ part.T / 64
        picks = [int(cosines.clone().fill_diagonal_(-torch.inf).amax(1).argmin())] if count else []
        while len(picks) < count:
            reach = cosines[picks].amax(0)
            reach[picks] = torch.inf
            picks.append(int(reach.argmin()))
        expected += picks
    return max_min(features.half().to(device), CHECK_OFFSETS, CHECK_COUNTS).tolist() == expected
