"""`merge_to_targets` against VisionZip's one-hot product."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from vlmprune.kernels.bench.case import HEAD_DIM, Case, Contender, Plan, close
from vlmprune.kernels.merge_to_targets import merge_to_targets


def plan(case: Case) -> Plan:
    values, metric = case.random(case.batch, case.tokens, case.dim), case.random(case.batch, case.tokens, HEAD_DIM)
    targets = torch.arange(0, case.tokens, case.tokens // case.kept, device=case.device)[: case.kept]
    flat, keys, all_targets = values.flatten(0, 1), metric.flatten(0, 1), targets.repeat(case.batch)
    ends = [case.kept * i for i in range(case.batch + 1)]
    others = torch.ones(case.tokens, dtype=torch.bool, device=case.device)
    others[targets] = False

    def assigned() -> Tensor:
        unit = functional.normalize(metric, dim=-1)
        return (unit[:, others] @ unit[:, targets].transpose(1, 2)).argmax(-1)

    def one_hot() -> Tensor:
        matrix = functional.one_hot(assigned(), case.kept).to(case.dtype)
        counts = matrix.sum(1).clamp(min=1)[..., None]
        return values[:, targets] + matrix.transpose(1, 2) @ values[:, others] / counts

    def scattered() -> Tensor:
        wide = assigned()[..., None].expand(-1, -1, case.dim)
        merged = values[:, targets]
        return merged.scatter_reduce(1, wide, values[:, others], "mean", include_self=True)

    moved = values.nbytes * (case.tokens + case.kept) // case.tokens + metric.nbytes
    return moved, [
        Contender(
            "ours", "", lambda: merge_to_targets(flat, keys, case.offsets, all_targets, ends, combine="target_plus_mean")
        ),
        Contender("torch", "similarity matrix, scatter_reduce", scattered, case.batch * case.tokens * case.kept),
        Contender(
            "official", "similarity matrix, product with a one-hot matrix", one_hot,
            case.batch * case.tokens * case.kept * case.dim / 8, 16 * case.batch * case.tokens * case.kept,
        ),
    ]  # fmt: skip


def check(device: str) -> bool:
    values, metric, targets = torch.randn(641, 33), torch.randn(641, 80), torch.arange(0, 641, 13)
    unit = functional.normalize(metric.double(), dim=1)
    groups = (unit @ unit[targets].T).argmax(1)
    groups[targets] = torch.arange(len(targets))
    onto = functional.one_hot(groups, len(targets)).T.double()
    offsets, ends = [0, 641], [0, len(targets)]
    found = merge_to_targets(values.to(device), metric.to(device), offsets, targets.to(device), ends)
    return torch.equal(found.groups.cpu(), groups) and close(
        found.values, onto @ values.double() / onto.sum(1)[:, None]
    )
