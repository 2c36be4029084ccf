"""`windowed_topk` against a loop over the windows."""

from __future__ import annotations

import torch
from torch import Tensor

from vlmprune.kernels.bench.case import Case, Contender, Plan
from vlmprune.kernels.windowed_topk import windowed_topk

WINDOWS = 16


def plan(case: Case) -> Plan:
    tokens = case.batch * case.tokens
    scores = torch.randn(tokens, device=case.device)
    # Columns of a window are apart, as in a grid.
    image, column = torch.arange(tokens, device=case.device) // case.tokens, torch.arange(tokens, device=case.device)
    windows = image * WINDOWS + column % WINDOWS
    quotas = [max(1, case.kept // WINDOWS)] * (WINDOWS * case.batch)
    return 12 * tokens + 8 * sum(quotas), [
        Contender("ours", "", lambda: windowed_topk(scores, windows, quotas)),
        Contender("torch", "loop over the windows", lambda: one_by_one(scores, windows, quotas)),
    ]


def one_by_one(scores: Tensor, windows: Tensor, quotas: list[int]) -> Tensor:
    """The best of each window in turn."""
    picks = []
    for window, quota in enumerate(quotas):
        tokens = (windows == window).nonzero().flatten()
        picks.append(tokens[scores[tokens].sort(stable=True, descending=True).indices[:quota]])
    return torch.cat(picks).sort().values


def check(device: str) -> bool:
    scores, windows = torch.randn(641).mul(4).round(), torch.randint(0, 7, (641,))
    quotas = list(range(7))
    found = windowed_topk(scores.to(device), windows.to(device), quotas)
    return torch.equal(found.cpu(), one_by_one(scores, windows, quotas))
