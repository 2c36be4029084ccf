"""`bipartite_match` against the whole similarity matrix, as ToMe's published code makes it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from vlmprune.kernels.bench.case import CHECK_LENGTHS, CHECK_OFFSETS, HEAD_DIM, Case, Contender, Plan, close
from vlmprune.kernels.bipartite_match import bipartite_match


def plan(case: Case) -> Plan:
    metric = case.random(case.batch, case.tokens, HEAD_DIM)
    half = case.tokens // 2
    sources, destinations = metric[:, : 2 * half : 2].flatten(0, 1), metric[:, 1 : 2 * half : 2].flatten(0, 1)
    bounds = [half * i for i in range(case.batch + 1)]
    square = case.batch * half**2

    def straightforward() -> tuple[Tensor, Tensor]:
        unit = functional.normalize(metric.float(), dim=-1)
        scores = unit[:, : 2 * half : 2] @ unit[:, 1 : 2 * half : 2].transpose(1, 2)
        return scores.argmax(-1), scores.amax(-1)

    def official() -> tuple[Tensor, Tensor]:
        unit = metric / metric.norm(dim=-1, keepdim=True)
        best = (unit[:, : 2 * half : 2] @ unit[:, 1 : 2 * half : 2].transpose(1, 2)).max(-1)
        return best.indices, best.values

    return metric.nbytes + 12 * case.batch * half, [
        Contender("ours", "", lambda: bipartite_match(sources, destinations, bounds, bounds)),
        Contender("torch", "whole matrix in fp32, argmax and amax", straightforward, square, 4 * square),
        Contender("official", "whole matrix in the metric's dtype, max", official, square, 4 * square),
    ]


def check(device: str) -> bool:
    sources, destinations = torch.randn(CHECK_OFFSETS[-1], 80), torch.randn(CHECK_OFFSETS[-1], 80)
    pairs = zip(sources.double().split(CHECK_LENGTHS), destinations.double().split(CHECK_LENGTHS), strict=True)
    best = [
        (functional.normalize(s, dim=1) @ functional.normalize(d, dim=1).T).max(1) for s, d in pairs if s.numel() > 0
    ]
    partners, scores = bipartite_match(sources.to(device), destinations.to(device), CHECK_OFFSETS, CHECK_OFFSETS)
    return torch.equal(partners.cpu(), torch.cat([b.indices for b in best])) and close(
        scores, torch.cat([b.values for b in best])
    )
