"""`generate` with a cache that was pruned, or will be."""

from __future__ import annotations

from torch import nn

from ..hooks import HookSet


def patch_generation(model: nn.Module, hooks: HookSet) -> None:
    """Let `generate` use caches that are pruned."""
