"""`coverage_from_values` against the loop of MMTok's published code."""

from __future__ import annotations

import torch
from torch import Tensor

from vlmprune.kernels.bench.case import Case, Contender, Plan
from vlmprune.kernels.bench.ops.coverage import plain_coverage
from vlmprune.kernels.coverage_from_values import coverage_from_values

# Rows besides those of the tokens themselves: the words of a question.
WORDS = 12


def plan(case: Case) -> Plan:
    rows = case.tokens + WORDS
    values = [(torch.randn(case.tokens, rows, device=case.device) * 5).softmax(0) / rows for _ in range(case.batch)]
    elements = case.batch * case.tokens * rows
    return 4 * elements * case.kept, [
        Contender("ours", "", lambda: [coverage_from_values(image, case.kept) for image in values]),
        Contender(
            "official", "all gains at every step", lambda: [plain_coverage(image, case.kept) for image in values],
            case.kept * elements, 8 * elements,
        ),
    ]  # fmt: skip


def check(device: str) -> bool:
    values: Tensor = torch.randint(-2, 9, (200, 77)).float()
    found = coverage_from_values(values.to(device), 60)
    return torch.equal(found.cpu(), plain_coverage(values.double(), 60))
