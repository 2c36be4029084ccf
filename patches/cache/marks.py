"""What a method that changes attention must remember of a prompt, in the caller's columns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor


@dataclass(frozen=True, eq=False)
class AttentionMarks:
    """Visual tokens and sinks of the prompts that a cache holds.

    Attributes:
        method: the name of the method that made them.
        layers: the layers whose attention changes, ascending.
        visual: bool `[batch, columns]`, of the caller's columns up to the latest prefill with images.
        sinks: bool `[batch, layers, columns]`.
        dimensions: bool `[batch, dim]`, the channels that tell sinks.
    """

    method: str
    layers: tuple[int, ...]
    visual: Tensor
    sinks: Tensor
    dimensions: Tensor

    def cropped(self, caller_length: int) -> AttentionMarks:
        """Return the marks once everything from the caller's column `caller_length` on is taken away."""
        return replace(self, visual=self.visual[:, :caller_length], sinks=self.sinks[..., :caller_length])

    def with_rows(self, change: Callable[[Tensor], Tensor]) -> AttentionMarks:
        """Return the marks after `change` was made to the rows of the cache."""
        return replace(self, visual=change(self.visual), sinks=change(self.sinks), dimensions=change(self.dimensions))
