"""`token_transition` against torch's norms and cosine."""

from __future__ import annotations

import torch
from torch import Tensor

from vlmprune.kernels.bench.case import Case, Contender, Plan, close
from vlmprune.kernels.token_transition import token_transition


def plan(case: Case) -> Plan:
    tokens = case.batch * case.tokens
    entering, leaving = case.random(tokens, case.dim), case.random(tokens, case.dim)

    def official() -> tuple[Tensor, Tensor]:
        ratio = leaving.float().norm(dim=-1) / entering.float().norm(dim=-1)
        return ratio, torch.cosine_similarity(entering.float(), leaving.float(), dim=-1)

    return entering.nbytes + leaving.nbytes + 8 * tokens, [
        Contender("ours", "", lambda: token_transition(entering, leaving)),
        Contender("torch", "two norms and a cosine", official),
    ]


def check(device: str) -> bool:
    entering, leaving = torch.randn(641, 33), torch.randn(641, 33)
    ratio, cosine = token_transition(entering.to(device), leaving.to(device))
    before, after = entering.double(), leaving.double()
    return close(ratio, after.norm(dim=1) / before.norm(dim=1)) and close(
        cosine, torch.cosine_similarity(before, after)
    )
