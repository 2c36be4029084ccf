"""Calls of an op that stand for all kernels it launches: what is compiled ahead of time, without a GPU.

An op's file lists them as `COMPILE_CASES`; signatures and specialisations are read off the launches that they make.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Like:
    """A tensor of this dtype and shape, holding zeros.

    Attributes:
        dtype: its dtype.
        shape: its shape.
        strided: every second element of a row, so that no dimension is contiguous.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    strided: bool = False

    def make(self) -> Tensor:
        """Return the tensor, on the CPU."""
        if self.strided:
            return torch.zeros(*self.shape[:-1], 2 * self.shape[-1], dtype=self.dtype)[..., ::2]
        return torch.zeros(self.shape, dtype=self.dtype)


@dataclass(frozen=True)
class CompileCase:
    """One call of a launching function.

    Attributes:
        name: what is special about it.
        launch: the function that launches the kernels.
        arguments: its arguments; `Like`s, also in a list or tuple, become tensors.
        options: its keyword arguments, likewise.
    """

    name: str
    launch: Callable[..., object]
    arguments: tuple[Any, ...]
    options: Mapping[str, Any] = field(default_factory=dict)

    def call(self) -> None:
        """Make the tensors and call the function."""
        self.launch(*map(_made, self.arguments), **{name: _made(value) for name, value in self.options.items()})


def _made(value: Any) -> Any:
    if isinstance(value, Like):
        return value.make()
    return type(value)(map(_made, value)) if isinstance(value, (list, tuple)) else value
