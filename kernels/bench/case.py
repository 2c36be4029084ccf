"""What the benchmark of an op is made of: a shape, and the ways to compute it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

HEADS, KV_HEADS, HEAD_DIM = 16, 4, 128

# Ragged segments and counts on which the checks run.
CHECK_OFFSETS, CHECK_COUNTS = [0, 1, 64, 64, 641], [1, 16, 0, 100]
CHECK_LENGTHS = [1, 63, 0, 577]


@dataclass(frozen=True)
class Case:
    """One shape: `batch` segments of `tokens` tokens, of which `kept` are kept."""

    batch: int
    tokens: int
    kept: int
    dim: int
    dtype: torch.dtype
    device: str

    @property
    def offsets(self) -> list[int]:
        """Where the rows of the batch begin when they are packed, and their end."""
        return [self.tokens * i for i in range(self.batch + 1)]

    def random(self, *shape: int) -> Tensor:
        """Random values of the case's dtype on its device."""
        return torch.randn(*shape, device=self.device, dtype=self.dtype)


@dataclass(frozen=True)
class Contender:
    """A way to compute an op: `elements` and `peak_bytes` are rough, and decide whether it is tried at all."""

    name: str
    how: str
    run: Callable[[], object]
    elements: float = 0
    peak_bytes: float = 0


# The bytes that the op must move at least, and the contenders, "ours" first.
Plan = tuple[int, list[Contender]]


def close(found: Tensor, expected: Tensor) -> bool:
    """Whether fp32 results agree with a float64 computation."""
    return torch.allclose(found.cpu().double(), expected, atol=1e-5, rtol=1e-4)


def signs(dim: int = 64) -> Tensor:
    """Rows of ones and minus ones for the checks: norms and cosines are exact, and most are tied."""
    return torch.randint(0, 2, (CHECK_OFFSETS[-1], dim)) * 2.0 - 1.0
