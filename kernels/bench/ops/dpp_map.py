"""`dpp_map` against the batched loop of CDPruner's published code."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from vlmprune.kernels.bench.case import Case, Contender, Plan
from vlmprune.kernels.dpp_map import dpp_map


def plan(case: Case) -> Plan:
    features = case.random(case.batch * case.tokens, case.dim)
    weights = torch.rand(case.batch * case.tokens, device=case.device)
    images, relevance = features.view(case.batch, case.tokens, case.dim), weights.view(case.batch, case.tokens)
    offsets, k = case.offsets, [case.kept] * case.batch
    square = case.batch * case.tokens**2

    def official() -> Tensor:
        unit = functional.normalize(images, dim=-1).float()
        matrix = relevance[:, :, None] * (unit @ unit.transpose(1, 2)) * relevance[:, None]
        return batched_loop(matrix, case.kept)

    return features.nbytes + 8 * square + 2 * case.batch * case.tokens * case.kept**2, [
        Contender("ours", "", lambda: dpp_map(features, offsets, k, weights=weights)),
        Contender(
            "official", "the same recursion on the weighted matrix, batched", official,
            square + case.batch * case.tokens * case.kept**2 / 2, 16 * square,
        ),
    ]  # fmt: skip


def batched_loop(matrix: Tensor, k: int) -> Tensor:
    """Fast greedy MAP (Chen et al., arXiv 1709.05135) of `[batch, tokens, tokens]`, as CDPruner's description has it."""
    batch, tokens, _ = matrix.shape
    rows = torch.arange(batch, device=matrix.device)
    gains = matrix.diagonal(dim1=1, dim2=2).clone()
    factor = matrix.new_zeros(k, batch, tokens)
    picks = torch.empty(batch, k, dtype=torch.int64, device=matrix.device)
    for i in range(k):
        best = gains.argmax(-1)
        picks[:, i] = best
        done = torch.einsum("tb,tbn->bn", factor[:i, rows, best], factor[:i])
        factor[i] = (matrix[rows, best] - done) / gains[rows, best].sqrt()[:, None]
        gains -= factor[i].square()
        gains[rows, best] = -torch.inf
    return picks


def check(device: str) -> bool:
    features, weights = torch.randn(641, 128), torch.rand(641) + 0.1
    offsets, counts = [0, 1, 64, 64, 641], [1, 16, 0, 60]
    unit = functional.normalize(features.double(), dim=1) * weights.double()[:, None]
    expected = [
        batched_loop((part @ part.T)[None], count)[0]
        for part, count in zip(unit.split([1, 63, 0, 577]), counts, strict=True)
        if count
    ]
    found = dpp_map(features.to(device), offsets, counts, weights=weights.to(device))
    return torch.equal(found.cpu(), torch.cat(expected))
