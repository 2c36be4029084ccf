"""`coverage` against the loop of SCOPE's published code, and against a plain one."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from vlmprune.kernels.bench.case import CHECK_COUNTS, CHECK_LENGTHS, CHECK_OFFSETS, Case, Contender, Plan, signs
from vlmprune.kernels.coverage import coverage


def plan(case: Case) -> Plan:
    features = case.random(case.batch * case.tokens, case.dim)
    weights = torch.rand(case.batch * case.tokens, device=case.device)
    images = list(zip(features.split(case.tokens), weights.split(case.tokens), strict=True))
    offsets, k = case.offsets, [case.kept] * case.batch
    square = case.batch * case.tokens**2

    def one_by_one() -> list[Tensor]:
        return [plain_coverage(cosines(x), case.kept, weight) for x, weight in images]

    def all_at_once() -> Tensor:
        return full_matrix(torch.stack([cosines(x) for x, _ in images]), case.kept, weights.view(case.batch, -1))

    return features.nbytes + 8 * square + 4 * square * case.kept, [
        Contender("ours", "", lambda: coverage(features, offsets, k, weights=weights)),
        Contender("torch", "all gains at every step", one_by_one, case.kept * square, 12 * case.tokens**2),
        Contender(
            "official", "masked copy, difference and maximum of the matrix at every step", all_at_once,
            case.kept * square, 20 * square,
        ),
    ]  # fmt: skip


def cosines(features: Tensor) -> Tensor:
    unit = functional.normalize(features.float(), dim=-1)
    return unit @ unit.T


def plain_coverage(values: Tensor, k: int, weights: Tensor | None = None) -> Tensor:
    """Picks by the values `[tokens, rows]`, the gain of every token again at every step."""
    picks = torch.empty(k, dtype=torch.int64, device=values.device)
    weights = values.new_ones(values.shape[0]) if weights is None else weights
    chosen = torch.zeros(values.shape[0], dtype=torch.bool, device=values.device)
    cover = values.new_zeros(values.shape[1])
    for i in range(k):
        gain = (values - cover).clamp_(min=0).sum(1) * weights
        picks[i] = gain.masked_fill_(chosen, -torch.inf).argmax()
        chosen[picks[i]] = True
        cover = torch.maximum(cover, values[picks[i]])
    return picks


def full_matrix(matrix: Tensor, k: int, weights: Tensor) -> Tensor:
    """SCOPE's step as its description has it: `[batch, tokens, tokens]` is copied, masked and compared at every pick."""
    batch, tokens, _ = matrix.shape
    picks = torch.empty(batch, k, dtype=torch.int64, device=matrix.device)
    cover = matrix.new_zeros(batch, tokens)
    chosen = torch.zeros(batch, tokens, dtype=torch.bool, device=matrix.device)
    for i in range(k):
        open_rows = matrix.masked_fill(chosen[:, None, :], 0.0)
        gain = torch.maximum(open_rows - cover[:, :, None], torch.zeros_like(open_rows)).sum(1) * weights
        picks[:, i] = gain.masked_fill(chosen, -torch.inf).argmax(-1)
        chosen.scatter_(1, picks[:, i : i + 1], True)
        cover = torch.maximum(cover, matrix.gather(1, picks[:, i, None, None].expand(-1, 1, tokens)).squeeze(1))
    return picks


def check(device: str) -> bool:
    features = signs()
    expected = [
        plain_coverage(part.double() @ part.double().T / 64, count)
        for part, count in zip(features.split(CHECK_LENGTHS), CHECK_COUNTS, strict=True)
    ]
    found = coverage(features.half().to(device), CHECK_OFFSETS, CHECK_COUNTS)
    return torch.equal(found.cpu(), torch.cat(expected))
