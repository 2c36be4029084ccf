"""Kernel tests: every op's Triton path runs on the GPU, or in Triton's interpreter on the CPU where there is none."""

import importlib
import os
import pkgutil
import sys
from types import ModuleType
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    # Only counts before triton is first imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")

import vlmprune.kernels
from vlmprune.kernels.shared import implementation

# An op is a file of the folder; what the ops share lies in a folder beside them.
OPS = [module.name for module in pkgutil.iter_modules(vlmprune.kernels.__path__)]
KERNEL_MODULES = [
    importlib.import_module(module.name)
    for folder in ("vlmprune.kernels", "vlmprune.kernels.shared")
    for module in pkgutil.iter_modules(importlib.import_module(folder).__path__, f"{folder}.")
]


class PoisonedTorch(ModuleType):
    """torch, except that uninitialised memory holds NaN or the lowest integer: an unwritten output shows."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def empty(*size: Any, **options: Any) -> torch.Tensor:
        return _poison(torch.empty(*size, **options))

    @staticmethod
    def empty_strided(*size: Any, **options: Any) -> torch.Tensor:
        return _poison(torch.empty_strided(*size, **options))

    @staticmethod
    def empty_like(other: torch.Tensor, **options: Any) -> torch.Tensor:
        return _poison(torch.empty_like(other, **options))


def _poison(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.dtype == torch.bool:
        return tensor.fill_(True)
    if tensor.is_floating_point():
        return tensor.fill_(float("nan"))
    limits = torch.iinfo(tensor.dtype)
    return tensor.fill_(limits.min or limits.max)


@pytest.fixture(autouse=True)
def poisoned_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    poisoned = PoisonedTorch("torch")
    for module in KERNEL_MODULES:
        if hasattr(module, "torch"):
            monkeypatch.setattr(module, "torch", poisoned)
    for name in ("new_empty", "new_empty_strided"):
        right = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor, name, lambda *args, _right=right, **options: _poison(_right(*args, **options))
        )


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def ops() -> list[str]:
    """The ops of the folder, in the order of their names."""
    return sorted(OPS)


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
