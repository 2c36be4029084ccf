"""Kernel tests: every op's Triton path runs on the GPU, or in Triton's interpreter on the CPU where there is none."""

import os
import sys
from types import ModuleType
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    # Only counts before triton is first imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")

from vlmprune.kernels import (
    compact,
    greedy,
    implementation,
    max_min,
    merge_scatter,
    received_attention,
    row_attention,
    segmented_topk,
    segments,
)

OP_MODULES = (compact, greedy, max_min, merge_scatter, received_attention, row_attention, segmented_topk, segments)


class PoisonedTorch(ModuleType):
    """torch, except that uninitialised memory holds NaN or the lowest integer: an unwritten output shows."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def empty(*size: Any, **options: Any) -> torch.Tensor:
        return _poison(torch.empty(*size, **options))

    @staticmethod
    def empty_like(other: torch.Tensor, **options: Any) -> torch.Tensor:
        return _poison(torch.empty_like(other, **options))


def _poison(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.dtype == torch.bool:
        return tensor.fill_(True)
    return tensor.fill_(float("nan") if tensor.is_floating_point() else torch.iinfo(tensor.dtype).min)


@pytest.fixture(autouse=True)
def poisoned_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    poisoned = PoisonedTorch("torch")
    for module in OP_MODULES:
        monkeypatch.setattr(module, "torch", poisoned)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def device() -> str:
    """Where the Triton path is tested."""
    if torch.cuda.is_available():
        return "cuda"
    if not implementation.TRITON_FOUND:
        pytest.skip("triton is not installed")
    if not implementation.triton_is_interpreted():
        pytest.fail(f"TRITON_INTERPRET=1 must be set before triton is imported (imported: {'triton' in sys.modules})")
    return "cpu"


@pytest.fixture
def large_shapes(device: str) -> None:
    """For shapes that take the interpreter minutes; the reference is tested on them everywhere."""
    if device == "cpu":
        pytest.skip("needs a GPU: the interpreter takes minutes for this shape")
