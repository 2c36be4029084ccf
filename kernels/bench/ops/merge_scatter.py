"""`merge_scatter` against two `scatter_reduce_`."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from vlmprune.kernels.bench.case import Case, Contender, Plan, close
from vlmprune.kernels.merge_scatter import merge_scatter


def plan(case: Case) -> Plan:
    tokens, outputs = case.batch * case.tokens, case.batch * case.kept
    source, sizes = case.random(tokens, case.dim), torch.rand(tokens, device=case.device) + 0.5
    destination = torch.randint(0, outputs, (tokens,), device=case.device)

    def scatter() -> Tensor:
        wide = destination[:, None].expand(-1, case.dim)
        total = torch.zeros(outputs, device=case.device).scatter_reduce_(0, destination, sizes, "sum")
        weighted = torch.zeros(outputs, case.dim, device=case.device)
        weighted.scatter_reduce_(0, wide, source.float() * sizes[:, None], "sum")
        return (weighted / total[:, None]).to(case.dtype)

    return source.nbytes * (tokens + outputs) // tokens, [
        Contender("ours", "", lambda: merge_scatter(source, destination, sizes, outputs)),
        Contender("torch", "scatter_reduce of weighted tokens and sizes", scatter),
    ]


def check(device: str) -> bool:
    source, sizes, destination = torch.randn(641, 33), torch.rand(641), torch.randint(0, 63, (641,))
    onto = functional.one_hot(destination, 63).T.double() * sizes.double()
    merged, total = merge_scatter(source.to(device), destination.to(device), sizes.to(device), 63)
    expected = onto @ source.double() / onto.sum(1).clamp(min=1e-30)[:, None]
    return close(merged, expected) and close(total, onto.sum(1))
