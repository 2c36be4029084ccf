"""`max_min_from_distances` against the running minimum."""

from __future__ import annotations

import torch

from vlmprune.kernels.bench.case import Case, Contender, Plan, signs
from vlmprune.kernels.bench.ops.max_min import running_minimum
from vlmprune.kernels.max_min_from_distances import max_min_from_distances


def plan(case: Case) -> Plan:
    distances = torch.rand(case.batch, case.tokens, case.tokens, device=case.device)
    return distances.nbytes + 4 * case.batch * case.kept * case.tokens, [
        Contender("ours", "", lambda: [max_min_from_distances(matrix, case.kept) for matrix in distances]),
        Contender("torch", "running minimum", lambda: [running_minimum(matrix, case.kept) for matrix in distances]),
    ]


def check(device: str) -> bool:
    features = signs()[:64]
    distances = 64 - features @ features.T
    picks = [int(distances.clone().fill_diagonal_(torch.inf).amin(1).argmax())]
    while len(picks) < 16:
        reach = distances[picks].amin(0)
        reach[picks] = -torch.inf
        picks.append(int(reach.argmax()))
    return max_min_from_distances(distances.to(device), 16).tolist() == picks
